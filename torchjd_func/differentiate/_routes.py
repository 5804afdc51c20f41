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
    by_route = partial(_routes(linear, route)[0], linear, chunk_size)
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
    matrix = _routes(first, route)[1](first, second, chunk_size)
    if first.present is None or second.present is None:
        return matrix
    return torch.where(first.present.unsqueeze(-1) & second.present, matrix, 0)


def _routes(linear: Linearized, route: str) -> tuple[Callable[..., Gramian], Callable[..., Tensor]]:
    """Return how to contract; rows that are known, or were recorded as factors, are used so."""
    if linear.jacobian.known:
        return _ROUTES["jacobian"]
    if route == "auto":
        return _ROUTES["jacobian" if linear.jacobian.layers is None else "layerwise"]
    return _ROUTES[route]


def _over_shards(
    linear: Linearized, route: Callable[[_tree.Groups], Gramian], groups: _tree.Groups
) -> Gramian:
    """Contract all columns of the Jacobian, also where processes have parts of them."""
    if linear.shards is None:
        return route(groups)
    return Gramian(*linear.shards.contract(route, groups))


def _layerwise(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Multiply factors of rows, one layer at a time."""
    assert linear.jacobian.layers is not None
    matrices = gramians(linear.jacobian.layers, groups)
    return Gramian(_unsquared(matrices, linear), pullback_of(linear, groups))


def _layerwise_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Multiply factors of rows of both, one layer at a time."""
    assert first.jacobian.layers is not None
    assert second.jacobian.layers is not None
    products = cross_gramians(first.jacobian.layers, second.jacobian.layers, whole(first))
    return _unsquared(products, first)[0]


def _unsquared(products: Tensor, linear: Linearized) -> Tensor:
    """Undo the scale of products of rows."""
    scale = linear.jacobian.scale
    return unscaled(unscaled(products, scale), scale)


def _jacobian(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Build the Jacobian; its rows also serve the pullback."""
    flat = rows_of(linear)
    blocks = _tree.blocks(flat, groups)

    def pullback(weights: Tensor) -> PyTree:
        sums = _tree.weighted_sums(blocks, groups, weights, flat)
        return linear.leaves.rebuild(_tree.in_order(sums))

    return Gramian(_tree.gramians(blocks, groups), pullback)


def _jacobian_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Contract the two Jacobians."""
    a, b = rows_of(first), rows_of(second)

    def route(groups: _tree.Groups) -> Gramian:
        chosen = [([a[i] for i in group], [b[i] for i in group]) for group in groups]
        products = torch.stack([_tree.cross_gramian(*pair) for pair in chosen])
        return Gramian(products, pullback_of(second, groups))

    return _over_shards(first, route, whole(first)).matrices[0]


def _product(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Never build the Jacobian."""
    products = _products(linear, linear, chunk_size, groups)
    # Of two roundings of one number, in the precision of the objective, the mean: solvers take no
    # matrix that is not symmetric.
    return Gramian((products + products.mT) / 2, pullback_of(linear, groups))


def _product_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Build neither of the two Jacobians."""
    return _products(first, second, chunk_size, whole(first))[0]


def _products(
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
    return columns.permute(1, 2, 0).to(_tree.accumulation_dtype(columns.dtype))


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
    _check.choice("route", route, ("auto", *_ROUTES))
    _check.chunk_size(chunk_size)


_ROUTES = {
    "jacobian": (_jacobian, _jacobian_cross),
    "layerwise": (_layerwise, _layerwise_cross),
    "product": (_product, _product_cross),
}
