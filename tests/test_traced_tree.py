"""Trees in graphs have the leaves, the order and the structure that optree gives them."""

from collections import OrderedDict
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tests.helpers import assert_trees_close
from torchjd_func import _traced_tree, _tree
from torchjd_func.testing._compare import compiled


class Pair(NamedTuple):
    """A named tuple."""

    left: object
    right: object


numbers = st.none() | st.integers(0, 9) | st.builds(torch.tensor, st.floats(-1, 1))
trees = st.recursive(
    numbers,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("cabx"), inner, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@given(trees)
def test_leaves_and_structure_are_those_of_optree(tree):
    flattened = _traced_tree.flatten(tree)
    assert flattened is not None
    leaves, rebuild = flattened
    expected = _tree.leaves(tree)
    assert len(leaves) == len(expected)
    assert all(a is b for a, b in zip(leaves, expected, strict=True))
    same = rebuild(range(len(leaves)))
    assert _tree.same_structure(same, tree)
    assert _tree.leaves(same) == list(range(len(leaves)))
    traced = _traced_tree.paths(tree)
    assert traced is not None
    assert [".".join(map(str, path)) for path in traced] == _tree.paths(tree)
    names = [list(x) for x in (tree, same) if isinstance(x, dict)]
    assert names[:1] == names[1:]  # the order of insertion, too


@pytest.mark.parametrize("odd", [OrderedDict(b=1.0, a=2.0), {1: 1.0}, object(), torch.float64])
def test_other_containers_are_left_to_optree(odd):
    assert _traced_tree.flatten([odd]) is None
    assert _traced_tree.paths([odd]) is None


ODD = {
    "ordered": lambda x: OrderedDict(b=x, a=[x + 1]),
    "by numbers": lambda x: {2: x, 1: x + 1},
    "nested": lambda x: {"b": Pair(x, (x + 1, None)), "a": [{}, x + 2]},
    "alone": lambda x: x,
}


@pytest.mark.parametrize("name", ODD)
def test_graphs_map_every_tree_as_eager_code_does(name):
    def double(x):
        tree = ODD[name](x)
        return _tree.map(lambda a, b: a + b, tree, tree)

    x = torch.arange(3.0)
    assert_trees_close(compiled(double)[0](x), double(x))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (lambda x: {"b": x, "a": [x, None]}, True),
        (lambda x: {"a": [x, None], "b": x}, True),
        (lambda x: {"a": [x, x], "b": x}, False),
        (lambda x: {"a": (x, None), "b": x}, False),
        (lambda x: {"a": [x, None], "c": x}, False),
        (lambda x: OrderedDict(a=[x, None], b=x), False),
        (lambda x: {"a": Pair(x, None), "b": x}, False),
        (lambda x: {"a": [x, None, x], "b": x}, False),
    ],
)
def test_graphs_compare_structures_as_eager_code_does(other, same):
    def compared(x):
        return x + _tree.same_structure({"a": [x, None], "b": x}, other(x))

    if isinstance(other(torch.zeros(1)), OrderedDict) and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 traces no comparison of optree's structures")
    x = torch.zeros(1)
    assert compared(x) == compiled(compared)[0](x) == same
