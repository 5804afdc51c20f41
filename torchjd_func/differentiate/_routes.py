"""From a linearized objective to Gramians of groups of leaves, by routes that agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func.differentiate._layerwise import combine, cross_gramians, gramians
from torchjd_func.differentiate._linearized import Linearized, rows_of
from torchjd_func.differentiate._pullback import basis, pull_rows, unscaled

PyTree = Any


class Gramian(NamedTuple):
    """The Gramians of groups of leaves, and the pullback that goes with them."""

    matrices: Tensor  # (g, m, m), one for each group
    pullback: Callable[[Tensor], PyTree]  # (g, m) -> J^T weights, each leaf by its group's weights


def contract(
    linear: Linearized, route: str, chunk_size: int | None, groups: _tree.Groups
) -> Gramian:
    """Return the Gramian of each group of leaves of a linearized objective, by the chosen route."""
    by_route = partial(_gramian, _chosen(linear, route), linear, chunk_size)
    matrices, pullback = _over_shards(linear, by_route, groups)
    if linear.present is not None:
        matrices = _present.statistic(matrices, linear.present)
    return Gramian(matrices, pullback)


def contract_whole(
    linear: Linearized, route: str, chunk_size: int | None
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Return the Gramian `(m, m)` that weights come from, and the pullback of weights `(m,)`."""
    if linear.seen is None:
        matrices, pullback = contract(linear, route, chunk_size, whole(linear))
        return matrices[0], lambda weights: pullback(weights.unsqueeze(0))
    return _contract_seen(linear, route, chunk_size), pullback_of_all(linear)


def _contract_seen(linear: Linearized, route: str, chunk_size: int | None) -> Tensor:
    """Return the Gramian of the leaves, or of the rows, that weights come from."""
    assert linear.seen is not None
    places, rows = linear.seen
    if rows is None:
        return contract(linear, route, chunk_size, (places,)).matrices[0]
    kept = rows if linear.present is None else _present.rows(rows, linear.present)
    return _tree.gramian(kept) if linear.shards is None else linear.shards.contract_seen(kept)


def whole(linear: Linearized) -> _tree.Groups:
    """Return the one group of all leaves."""
    return (tuple(range(len(linear.leaves.paths))),)


def contract_cross(
    first: Linearized, second: Linearized, route: str, chunk_size: int | None
) -> Tensor:
    """Return the cross-Gramian of two linearized objectives, by the chosen route."""
    products = _PRODUCTS[_chosen(first, route)]
    matrix = products(first, second, chunk_size, whole(first))[0]
    if first.present is None or second.present is None:
        return matrix
    return torch.where(first.present.unsqueeze(-1) & second.present, matrix, 0)


def _chosen(linear: Linearized, route: str) -> str:
    """Return how to contract; rows that are known, or were recorded as factors, are used so."""
    if linear.jacobian.known:
        return "jacobian"
    if route == "auto":
        return "jacobian" if linear.jacobian.layers is None else "layerwise"
    return route


def _over_shards(
    linear: Linearized, route: Callable[[_tree.Groups], Gramian], groups: _tree.Groups
) -> Gramian:
    """Contract all columns of the Jacobian, also where processes have parts of them."""
    if linear.shards is None:
        return route(groups)
    return Gramian(*linear.shards.contract(route, groups))


def _gramian(
    route: str, linear: Linearized, chunk_size: int | None, groups: _tree.Groups
) -> Gramian:
    """Contract one objective; rows, if they are built, also serve the pullback."""
    if route != "jacobian":
        products = _PRODUCTS[route](linear, linear, chunk_size, groups)
        return Gramian(products, pullback_of(linear, groups))
    flat = rows_of(linear)
    blocks = _tree.blocks(flat, groups)

    def pullback(weights: Tensor) -> PyTree:
        sums = _tree.weighted_sums(blocks, groups, weights, flat)
        return linear.leaves.rebuild(_tree.in_order(sums))

    return Gramian(_tree.gramians(blocks, groups), pullback)


def _by_rows(
    first: Linearized, second: Linearized, chunk_size: int | None, groups: _tree.Groups
) -> Tensor:
    """Build both Jacobians, and contract them."""
    a, b = rows_of(first), rows_of(second)

    def route(groups: _tree.Groups) -> Gramian:
        chosen = [([a[i] for i in group], [b[i] for i in group]) for group in groups]
        products = torch.stack([_tree.cross_gramian(*pair) for pair in chosen])
        return Gramian(products, pullback_of(second, groups))

    return _over_shards(first, route, groups).matrices


def _by_layers(
    first: Linearized, second: Linearized, chunk_size: int | None, groups: _tree.Groups
) -> Tensor:
    """Multiply factors of rows of both, one layer at a time."""
    a, b, scale = first.jacobian.layers, second.jacobian.layers, first.jacobian.scale
    assert a is not None
    assert b is not None
    products = gramians(a, groups) if a is b else cross_gramians(a, b, groups)
    return unscaled(unscaled(products, scale), scale)


def _by_columns(
    first: Linearized, second: Linearized, chunk_size: int | None, groups: _tree.Groups
) -> Tensor:
    """Return `J_1 J_2^T` column by column: pull a unit cotangent back, and push the result forward.

    Pushing forward is the transpose of the pullback, which is linear; so no second forward pass.
    A group's product is what is pushed forward of its leaves alone.
    """
    layers = first.jacobian.layers
    _check.rows_are_here(layers is None or layers.ranks is None)
    origin = first.vector.new_zeros(first.vector.shape)
    push = torch.func.vjp(first.jacobian.pullback, origin)[1]

    def column(cotangent: Tensor) -> Tensor:
        """Return `J_1 J_2^T cotangent` of each group, `(g, m_1)`."""
        pulled = second.jacobian.pullback(cotangent)
        return torch.stack([push(_only(pulled, group))[0] for group in groups])

    columns = pull_rows(column, basis(second.vector), chunk_size or 1)
    products = columns.permute(1, 2, 0).to(_tree.accumulation_dtype(columns.dtype))
    # Of two roundings of one number, in the precision of the objective, the mean: solvers take no
    # matrix that is not symmetric.
    return (products + products.mT) / 2 if first is second else products


def _only(leaves: list[Tensor], group: tuple[int, ...]) -> list[Tensor]:
    """Return the leaves with zeros in the place of those outside the group."""
    return [leaf if i in group else torch.zeros_like(leaf) for i, leaf in enumerate(leaves)]


def pullback_of(linear: Linearized, groups: _tree.Groups) -> Callable[[Tensor], PyTree]:
    """Return the pullback for weights `(g, m)` of any floating dtype: one pass for each group."""
    layers, rebuild = linear.jacobian.layers, linear.leaves.rebuild
    if layers is not None and len(groups) > 1:  # all groups in one pass
        scale = linear.jacobian.scale
        return lambda weights: rebuild(unscaled(combine(layers, weights, groups), scale))

    def pullback(weights: Tensor) -> PyTree:
        """Return `J^T weights`, of each pass the leaves of its group."""
        found = {}
        for row, group in zip(weights.to(linear.vector.dtype).unbind(), groups, strict=True):
            leaves = linear.jacobian.pullback(row)
            found.update({i: leaves[i] for i in group})
        return rebuild(_tree.in_order(found))

    return pullback


def pullback_of_all(linear: Linearized) -> Callable[[Tensor], PyTree]:
    """Return the pullback for weights `(m,)` that all leaves share."""
    pullback = pullback_of(linear, whole(linear))
    return lambda weights: pullback(weights.unsqueeze(0))


def validate(route: str, chunk_size: int | None) -> None:
    """Check the options that all transforms to Gramians share."""
    _check.choice("route", route, ("auto", *_PRODUCTS))
    _check.chunk_size(chunk_size)


_PRODUCTS = {"jacobian": _by_rows, "layerwise": _by_layers, "product": _by_columns}
