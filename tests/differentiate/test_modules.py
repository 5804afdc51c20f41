"""Every module on every route, eager and as one graph, against one backward pass for each loss."""

import warnings

import pytest
import torch

import torchjd_func as jd
from tests.helpers import assert_trees_close, compiled
from tests.modules import CASES, MODES, ROUTES, by_loops, objective_of, step_of
from torchjd_func import _tree


def run(name, route, mode):
    """Return what one cell computes."""
    step, args = step_of(CASES[name], route)
    if mode == "compiled":
        step, _ = compiled(step)
    torch.manual_seed(1)
    return step(*args)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_each_cell_is_right_or_an_error(name, route, mode):
    case = CASES[name]
    message = case.message(route, mode)
    if message is not None:
        with pytest.raises(Exception, match=message):
            run(name, route, mode)
        return
    got, want = run(name, route, mode), by_loops(case)
    assert _tree.same_structure(got, want)
    for a, b in zip(_tree.leaves(got), _tree.leaves(want), strict=True):
        scale = b.abs().amax() if b.numel() else 0.0
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=float(case.tol * scale) + 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_routes_that_torch_loops_over_are_those_of_the_table(name):
    case = CASES[name]
    for route in ROUTES:
        if case.message(route, "eager") is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(name, route, "eager")
            warned = any("performance drop" in str(warning.message) for warning in caught)
            assert warned == (route in case.slow)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", [x for x in CASES if not CASES[x].message("layerwise", "eager")])
def test_modules_that_take_rows_layer_by_layer_are_those_of_the_table(name):
    objective, args = objective_of(CASES[name])
    explained = jd.explain_gramian(objective, *args, has_aux=True)
    takes_rows = {leaf.contraction == "m backward passes" for leaf in explained.leaves}
    assert takes_rows == {CASES[name].rows}


def test_the_loops_alone_do_not_pass():
    """The oracle is sensitive: another seed of the dropout gives other numbers."""
    step, args = step_of(CASES["`Dropout`, training"], "jacobian")
    torch.manual_seed(2)
    _, gramian, _, _ = step(*args)
    with pytest.raises(AssertionError):
        assert_trees_close(gramian, by_loops(CASES["`Dropout`, training"])[1])
