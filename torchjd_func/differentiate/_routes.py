"""From a linearized objective to Gramians of groups of leaves, by routes that agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._jacobian import row_leaves
from torchjd_func.differentiate._layerwise import Layers, combine, cross_gramians, gramians
from torchjd_func.differentiate._pullback import Linearized, basis, pull_rows, vjp

PyTree = Any


class Gramian(NamedTuple):
    """The Gramians of groups of leaves, and the pullback that goes with them."""

    matrices: Tensor  # (g, m, m), one for each group
    pullback: Callable[[Tensor], PyTree]  # (g, m) -> J^T weights, each leaf by its group's weights


def contract(
    linear: Linearized, route: str, chunk_size: int | None, groups: _tree.Groups
) -> Gramian:
    """Return the Gramian of each group of leaves of a linearized objective, by the chosen route."""
    return _over_shards(linear, partial(_ROUTES[route], linear, chunk_size), groups)


def _over_shards(
    linear: Linearized, route: Callable[[_tree.Groups], Gramian], groups: _tree.Groups
) -> Gramian:
    """Contract all columns of the Jacobian, also where ranks have parts of them."""
    if linear.shards is None:
        return route(groups)
    return Gramian(*linear.shards.contract(route, groups))


def contract_whole(
    linear: Linearized, route: str, chunk_size: int | None
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Return the Gramian `(m, m)` of all leaves, and the pullback of weights `(m,)`."""
    matrices, pullback = contract(linear, route, chunk_size, whole(linear))
    return matrices[0], lambda weights: pullback(weights.unsqueeze(0))


def whole(linear: Linearized) -> _tree.Groups:
    """Return the one group of all leaves."""
    return (tuple(range(len(linear.paths))),)


def _auto_route(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Take layer by layer what was recorded so."""
    route = _jacobian_route if linear.layers is None else _layerwise_route
    return route(linear, chunk_size, groups)


def _layerwise_route(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Multiply factors of rows, one layer at a time."""
    return Gramian(gramians(_layers(linear), groups), pullback_of(linear, groups))


def contract_cross(
    first: Linearized, second: Linearized, route: str, chunk_size: int | None
) -> Tensor:
    """Return the cross-Gramian of two linearized objectives, by the chosen route."""
    return _CROSS[route](first, second, chunk_size)


def _jacobian_route(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Build the Jacobian; its rows also serve the pullback."""
    flat = row_leaves(linear, chunk_size)
    blocks = _tree.blocks(flat, groups)

    def pullback(weights: Tensor) -> PyTree:
        """Return `J^T weights`."""
        return linear.rebuild(_tree.in_order(_tree.weighted_sums(blocks, groups, weights, flat)))

    return Gramian(_tree.gramians(blocks, groups), pullback)


def _product_route(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Never build the Jacobian."""
    return Gramian(_product(linear, linear, chunk_size, groups), pullback_of(linear, groups))


def _auto_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Take layer by layer what was recorded so."""
    cross = _jacobian_cross if first.layers is None else _layerwise_cross
    return cross(first, second, chunk_size)


def _layerwise_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Multiply factors of rows of both, one layer at a time."""
    return cross_gramians(_layers(first), _layers(second), whole(first))[0]


def _layers(linear: Linearized) -> Layers:
    """Return what was recorded layer by layer."""
    if linear.layers is not None:
        return linear.layers
    rule, remedy = "differentiate an objective that is not accumulated or scaled", "Use 'auto'."
    _check.fail(ValueError, "`route`", rule, "'layerwise'", remedy)


def _jacobian_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Contract the two Jacobians."""
    a, b = row_leaves(first, chunk_size), row_leaves(second, chunk_size)

    def route(groups: _tree.Groups) -> Gramian:
        """Contract the leaves of each group."""
        chosen = [([a[i] for i in group], [b[i] for i in group]) for group in groups]
        products = torch.stack([_tree.cross_gramian(*pair) for pair in chosen])
        return Gramian(products, pullback_of(second, groups))

    return _over_shards(first, route, whole(first)).matrices[0]


def _product_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Build neither of the two Jacobians."""
    return _product(first, second, chunk_size, whole(first))[0]


def _product(
    first: Linearized, second: Linearized, chunk_size: int | None, groups: _tree.Groups
) -> Tensor:
    """Return `J_1 J_2^T` column by column: pull a unit cotangent back, and push the result forward.

    Pushing forward is the transpose of the pullback, which is linear; so no second forward pass.
    A group's product is what is pushed forward of its leaves alone.
    """
    _check.rows_are_here(first.layers is None or first.layers.ranks is None)
    _, push = vjp(first.pullback, first.vector.new_zeros(first.vector.shape))

    def column(cotangent: Tensor) -> Tensor:
        """Return `J_1 J_2^T cotangent` of each group, `(g, m_1)`."""
        pulled = second.pullback(cotangent)
        return torch.stack([push(_only(pulled, group))[0] for group in groups])

    columns = pull_rows(column, basis(second.vector), chunk_size or 1)
    return columns.permute(1, 2, 0).to(_tree.accumulation_dtype(columns.dtype))


def _only(leaves: list[Tensor], group: tuple[int, ...]) -> list[Tensor]:
    """Return the leaves with zeros in the place of those outside the group."""
    return [leaf if i in group else torch.zeros_like(leaf) for i, leaf in enumerate(leaves)]


def pullback_of(linear: Linearized, groups: _tree.Groups) -> Callable[[Tensor], PyTree]:
    """Return the pullback for weights `(g, m)` of any floating dtype: one pass for each group."""
    layers = linear.layers
    if layers is not None:
        return lambda weights: linear.rebuild(combine(layers, weights, groups))

    def pullback(weights: Tensor) -> PyTree:
        """Return `J^T weights`, of each pass the leaves of its group."""
        found = {}
        for row, group in zip(weights.to(linear.vector.dtype).unbind(), groups, strict=True):
            leaves = linear.own(linear.pullback(row))
            found.update({i: leaves[i] for i in group})
        return linear.rebuild(_tree.in_order(found))

    return pullback


def validate(route: str, chunk_size: int | None) -> None:
    """Check the options that all transforms to Gramians share."""
    _check.choice("route", route, tuple(_ROUTES))
    _check.chunk_size(chunk_size)


_ROUTES = {
    "auto": _auto_route,
    "jacobian": _jacobian_route,
    "layerwise": _layerwise_route,
    "product": _product_route,
}
_CROSS = {
    "auto": _auto_cross,
    "jacobian": _jacobian_cross,
    "layerwise": _layerwise_cross,
    "product": _product_cross,
}
