"""Pytrees of tensors: the one place that knows about optree.

Leaves are visited in optree's order (dictionary keys sorted), whatever the order of insertion, so
that objectives and parameters are counted the same way everywhere. `None` holds no leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from torchjd_func._precision import accumulation_dtype, product, squares, sums
from torchjd_func._traced_tree import flatten as flatten_traced
from torchjd_func._traced_tree import paths as traced_paths
from torchjd_func._traced_tree import same_structure as same_traced

PyTree = Any
Groups = tuple[tuple[int, ...], ...]  # the leaves of each group, by their place in leaf order
SMALL = 2**14  # numbers in a row of a leaf, about where copying them costs as much as calling torch


class Block(NamedTuple):
    """The rows of leaves of one size."""

    places: list[int]  # k, in leaf order
    matrices: Tensor  # (k, m, n), real, in the precision of the leaves


def hollow(node: PyTree) -> bool:
    """Say whether `node` is an empty dict, or one of such, which optree cannot compile (2.13)."""
    return isinstance(node, dict) and all(hollow(child) for child in node.values())


def leaves(tree: PyTree) -> list[Any]:
    """Return the leaves of `tree`, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return flatten(tree)[0] if torch.compiler.is_compiling() else optree.tree_leaves(tree)


def tensors(tree: PyTree) -> list[Tensor]:
    """Return the tensors among the leaves of `tree`, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def flatten(tree: PyTree) -> tuple[list[Any], Callable[[Any], PyTree]]:
    """Return the leaves of `tree` and the function that puts such leaves back."""
    if not torch.compiler.is_compiling():
        found, structure = optree.tree_flatten(tree)
        return found, structure.unflatten
    traced = flatten_traced(tree)
    if traced is not None:
        return traced
    nodes, spec = optree.tree_flatten(tree, is_leaf=hollow)
    places = [place for place, node in enumerate(nodes) if not hollow(node)]

    def rebuild(values: Any) -> PyTree:
        """Put leaves in their places."""
        filled = list(nodes)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return optree.tree_unflatten(spec, filled)

    return [nodes[place] for place in places], rebuild


def map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply `fn` to corresponding leaves of trees of one structure."""
    if isinstance(tree, Tensor):
        return fn(tree, *rest)
    if _records(tree, *rest):
        return type(tree)(*[fn(*each) for each in zip(tree, *rest, strict=True)])
    if torch.compiler.is_compiling():
        flat, rebuild = flatten(tree)
        return rebuild([fn(*each) for each in zip(flat, *[leaves(x) for x in rest], strict=True)])
    return optree.tree_map(fn, tree, *rest)


def cut(fn: Callable[[Any], Sequence[Any]], tree: PyTree) -> list[PyTree]:
    """Cut all leaves alike, and return the trees of the parts."""
    flat, rebuild = flatten(tree)
    return [rebuild(parts) for parts in zip(*(fn(leaf) for leaf in flat), strict=True)]


def paths(tree: PyTree) -> list[str]:
    """Return the name of each leaf, such as `"encoder.0.weight"`."""
    if isinstance(tree, Tensor):
        return [""]
    found = traced_paths(tree) if torch.compiler.is_compiling() else optree.tree_paths(tree)
    if found is not None:
        return [".".join([str(part) for part in path]) for path in found]
    nodes = optree.tree_leaves(tree, is_leaf=hollow)
    pairs = zip(optree.tree_paths(tree, is_leaf=hollow), nodes, strict=True)
    return [".".join([str(part) for part in path]) for path, node in pairs if not hollow(node)]


def names(tree: PyTree) -> list[str]:
    """Return the name of each leaf, with the names of the fields of named tuples."""
    return [
        ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        for accessor in optree.tree_accessors(tree)
    ]


def same_structure(a: PyTree, b: PyTree) -> bool:
    """Say whether two trees differ in their leaves alone."""
    if _records(a, b):
        return True
    if not torch.compiler.is_compiling():
        return optree.tree_structure(a) == optree.tree_structure(b)
    traced = same_traced(a, b)
    if traced is not None:
        return traced
    holes = [[hollow(node) for node in optree.tree_leaves(tree, is_leaf=hollow)] for tree in (a, b)]
    structures = [optree.tree_structure(tree, is_leaf=hollow) for tree in (a, b)]
    return structures[0] == structures[1] and holes[0] == holes[1]


def _records(*trees: PyTree) -> bool:
    """Say whether trees are named tuples of tensors of one class: so is most states' structure."""
    kind = type(trees[0])
    return (isinstance(trees[0], tuple) and hasattr(trees[0], "_fields")) and all(
        [type(tree) is kind and all([isinstance(x, Tensor) for x in tree]) for tree in trees]
    )


def ravel(tree: PyTree) -> Tensor:
    """Return all numbers of `tree` as one vector, in leaf order."""
    flat = [leaf.reshape(-1) for leaf in leaves(tree)]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unravel(like: PyTree, vector: Tensor) -> PyTree:
    """Return the numbers of `vector` in the structure, shapes and dtypes of `like`."""
    flat, rebuild = flatten(like)
    parts = vector.split([leaf.numel() for leaf in flat])
    pairs = zip(parts, flat, strict=True)
    return rebuild([part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in pairs])


def stack(trees: list[PyTree]) -> PyTree:
    """Stack the leaves of trees of one structure along a new first dimension."""
    return map(lambda *rows: torch.stack(rows), trees[0], *trees[1:])


def cat(trees: list[PyTree]) -> PyTree:
    """Join the rows of trees of one structure; a single one is not copied."""
    return trees[0] if len(trees) == 1 else map(lambda *rows: torch.cat(rows), trees[0], *trees[1:])


def mean(trees: list[PyTree]) -> PyTree:
    """Return the mean of trees of one structure."""
    return trees[0] if len(trees) == 1 else map(lambda *terms: sum(terms) / len(terms), *trees)


def wide(leaf: Tensor) -> Tensor:
    """Return `leaf` in the dtype in which sums over it are kept."""
    return leaf.to(accumulation_dtype(leaf.dtype))


def real_shape(leaf: Tensor) -> tuple[int, ...]:
    """Return the shape of `real(leaf)`."""
    return (*leaf.shape, 2) if leaf.is_complex() else tuple(leaf.shape)


def real(leaf: Tensor) -> Tensor:
    """View a leaf as real numbers, in float32 or better; complex ones gain a last dimension."""
    pairs = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    return pairs.to(accumulation_dtype(leaf.dtype))


def rows(leaf: Tensor) -> Tensor:
    """View a leaf `(m, ...)` of a Jacobian as a real matrix `(m, n)`, in float32 or better."""
    return wide(matrix(leaf))


def matrix(leaf: Tensor) -> Tensor:
    """View a leaf `(m, ...)` of a Jacobian as a real matrix `(m, n)`."""
    pairs = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    return pairs.flatten(1) if pairs.ndim > 1 else pairs.unsqueeze(1)


def per_row(values: Tensor, leaf: Tensor) -> Tensor:
    """Append dimensions to `(m,)`, so that it is one value for each row of a leaf."""
    return values.reshape((*values.shape, *[1] * (leaf.ndim - values.ndim)))


def row_like(row: Tensor, leaf: Tensor) -> Tensor:
    """Return a row of real numbers in the shape and dtype of a row of `leaf`; undoes `rows`."""
    shaped = row.reshape(real_shape(leaf)[1:])
    return (torch.view_as_complex(shaped) if leaf.is_complex() else shaped).to(leaf.dtype)


def cross_gramian(jac_1: PyTree, jac_2: PyTree) -> Tensor:
    """Return `J_1 J_2^T`, `(m_1, m_2)`, in float64, as the sum of the leaves' products."""
    pairs = zip(leaves(jac_1), leaves(jac_2), strict=True)
    return functools.reduce(torch.add, [product(matrix(a), matrix(b)) for a, b in pairs])


def gramian(jac: PyTree) -> Tensor:
    """Return `J J^T`, `(m, m)`, as the sum of the leaves' Gramians; nothing is concatenated."""
    own = [matrix(leaf) for leaf in leaves(jac)]
    return functools.reduce(torch.add, [product(rows, rows) for rows in own])


def squared_norms(jac: PyTree) -> Tensor:
    """Return the squared norm of each row, `(m,)` in float64."""
    return functools.reduce(torch.add, [squares(matrix(leaf)) for leaf in leaves(jac)])


def blocks(flat: list[Tensor], groups: Groups) -> list[Block]:
    """Return the leaves of groups as blocks of rows.

    Small leaves of one shape share a block: copying them costs less than operations of their own.
    """
    alike: dict[Any, list[int]] = {}
    for i in [i for group in groups for i in group]:
        shape = flat[i].shape[1:]
        alone = i if shape.numel() > SMALL else None
        alike.setdefault((tuple(shape), flat[i].dtype, alone), []).append(i)
    return [Block(places, _stack([matrix(flat[i]) for i in places])) for places in alike.values()]


def gramians(parts: list[Block], groups: Groups) -> Tensor:
    """Return the Gramian of each group of leaves, `(g, m, m)`, in float64."""
    found: dict[int, Tensor] = {}
    for places, matrices in parts:
        found.update(zip(places, product(matrices, matrices).unbind(), strict=True))
    return torch.stack([functools.reduce(torch.add, [found[i] for i in g]) for g in groups])


def weighted_sum(jac: PyTree, weights: Tensor) -> PyTree:
    """Return `J^T weights`: each leaf `(m, ...)` loses its first dimension and keeps its dtype.

    Accumulated in float32 or better, in float64 if the weights are.
    """

    def combine(leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            return row_like(sums(weights.unsqueeze(0), matrix(leaf)).squeeze(0), leaf)
        row = sums(weights.unsqueeze(0), matrix(leaf))
        return row.reshape(leaf.shape[1:]).to(leaf.dtype)

    return map(combine, jac)


def weighted_sums(
    parts: list[Block], groups: Groups, weights: Tensor, like: list[Tensor]
) -> dict[int, Tensor]:
    """Return `J^T weights` of the leaves of groups, each by the weights `(g, m)` of its group."""
    pairs = zip(groups, weights.unbind(), strict=True)
    owned = {i: row for group, row in pairs for i in group}
    found: dict[int, Tensor] = {}
    for places, matrices in parts:
        shares = torch.stack([owned[i] for i in places]).unsqueeze(1)
        totals = sums(shares, matrices).squeeze(1).unbind()
        found.update({i: row_like(row, like[i]) for i, row in zip(places, totals, strict=True)})
    return found


def row_sums(jac: PyTree, weights: Tensor) -> list[Tensor]:
    """Return the real leaves of `W J`, `(k, n)` in float64, for weights `(k, m)`."""
    return [sums(weights.double(), matrix(leaf)) for leaf in leaves(jac)]


def _stack(matrices: list[Tensor]) -> Tensor:
    """Stack matrices; a single one is not copied."""
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)


def in_order(found: dict[int, Tensor]) -> list[Tensor]:
    """Return leaves by their place in leaf order."""
    return [found[place] for place in range(len(found))]


def leading_size(tree: PyTree) -> int:
    """Return the size of the first dimension of the first leaf."""
    return leaves(tree)[0].shape[0]


def placeholder(leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of `shape` with the dtype and device of `leaf`, without its memory."""
    return leaf.new_zeros(()).expand(shape)
