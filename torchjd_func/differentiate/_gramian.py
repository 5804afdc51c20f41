"""Gramians of a vector of losses, by several routes that agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._jacobian import rows, value
from torchjd_func.differentiate._layerwise import Layers, combine, cross_gramians, gramians
from torchjd_func.differentiate._linearize import Linearized, basis, linearize, pull_rows, vjp

PyTree = Any


class Gramian(NamedTuple):
    """The Gramians of groups of leaves, and the pullback that goes with them."""

    matrices: Tensor  # (g, m, m), one for each group
    pullback: Callable[[Tensor], PyTree]  # (g, m) -> J^T weights, each leaf by its group's weights


def gramian(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    method: str = "auto",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Gramian `J J^T`.

    | method | cost beside one forward | memory beside the graph | when |
    |---|---|---|---|
    | `"jacobian"` | m backward, m^2 n multiplications | m n | default |
    | `"product"` | m backward, each run forward again | n * chunk_size | m n does not fit |

    All give the same Gramian, from one forward pass (dropout is drawn once). `"auto"` is
    `"jacobian"`.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        method: `"auto"`, `"jacobian"` or `"product"`.
        chunk_size: How many rows or columns at a time. `None` is the method's own choice: all for
            `"jacobian"`, one for `"product"`.

    Returns:
        `f(*args) -> G`, `(m, m)`, in float32 or better; `(G, aux)` with aux.

    Raises:
        ValueError: If `method`, `argnums` or `chunk_size` is not allowed.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.gramian(lambda x: (x.sum(), x.prod()))(torch.tensor([2.0, 3.0]))
        tensor([[ 2.,  5.],
                [ 5., 13.]])
    """
    validate(method, chunk_size)

    def gramian_fn(*args: Any) -> Any:
        """Return the Gramian (and aux)."""
        linear = linearize(fn, args, argnums, has_aux, method)
        matrix, _ = contract_whole(linear, method, chunk_size)
        return (matrix, linear.aux) if has_aux else matrix

    return gramian_fn


def gramian_and_value(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    method: str = "auto",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Gramian and its losses.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        method: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.

    Returns:
        `f(*args) -> (G, losses)`; `(G, (losses, aux))` with aux.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.gramian_and_value(lambda x: x.square())(torch.tensor([1.0, 3.0]))
        (tensor([[ 4.,  0.],
                 [ 0., 36.]]), tensor([1., 9.]))
    """
    validate(method, chunk_size)

    def gramian_and_value_fn(*args: Any) -> Any:
        """Return the Gramian and the losses (and aux)."""
        linear = linearize(fn, args, argnums, has_aux, method)
        matrix, _ = contract_whole(linear, method, chunk_size)
        return matrix, value(linear, has_aux)

    return gramian_and_value_fn


def gramian_vjp(
    fn: Callable[..., Any],
    *primals: Any,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    method: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Any, ...]:
    """Compute losses, Gramian and pullback of an objective, from one forward pass.

    Args:
        fn: As for `jd.jac`.
        *primals: The arguments of `fn`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        method: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.

    Returns:
        `(losses, G, vjp_fn)`, and `aux` as a fourth with aux; `vjp_fn(weights)` is `J^T weights`
        for weights `(m,)`, as a pytree like `primals[argnums]`. With `jd.multitask` it returns
        `(J^T weights, head_grads)`, the heads' plain gradients (weighted with `scale_heads`).

    Example:
        >>> import torch, torchjd_func as jd
        >>> x = torch.tensor([1.0, 3.0])
        >>> losses, gramian, vjp_fn = jd.gramian_vjp(lambda x: x.square(), x)
        >>> weights, _ = jd.mgda().weighting(gramian)
        >>> vjp_fn(weights)
        tensor([1.8000, 0.6000])
    """
    validate(method, chunk_size)
    linear = linearize(fn, primals, argnums, has_aux, method)
    matrix, pullback = contract_whole(linear, method, chunk_size)

    def vjp_fn(weights: Tensor) -> PyTree:
        """Return `J^T weights`."""
        _check.length("weights", _check.vector("weights", weights), linear.vector.shape[0])
        return linear.assemble(pullback(weights), weights)

    result = (linear.losses, matrix, vjp_fn)
    return (*result, linear.aux) if has_aux else result


def cross_gramian(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    method: str = "auto",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns `J_1 J_2^T` of two batches.

    Args:
        fn: Objective `fn(params, *batch)`.
        argnums: As for `jd.jac`; names one of the arguments before the batch.
        has_aux: As for `jd.jac`.
        method: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.

    Returns:
        `f(params, batch_1, batch_2) -> G`, `(m_1, m_2)`, not symmetric in general; each batch is a
        tuple of arguments of `fn`. `(G, (aux_1, aux_2))` with aux.

    Example:
        >>> import torch, torchjd_func as jd
        >>> cross = jd.cross_gramian(lambda w, x: (x @ w).square())
        >>> cross(torch.ones(2), (torch.eye(2),), (2 * torch.eye(2),))
        tensor([[16.,  0.],
                [ 0., 16.]])
    """
    validate(method, chunk_size)

    def cross_gramian_fn(*args: Any) -> Any:
        """Return the cross-Gramian (and both aux)."""
        leading, batch_1, batch_2 = _check.two_batches(args)
        first = linearize(fn, (*leading, *batch_1), argnums, has_aux, method)
        second = linearize(fn, (*leading, *batch_2), argnums, has_aux, method)
        matrix = contract_cross(first, second, method, chunk_size)
        return (matrix, (first.aux, second.aux)) if has_aux else matrix

    return cross_gramian_fn


def contract(
    linear: Linearized, method: str, chunk_size: int | None, groups: _tree.Groups
) -> Gramian:
    """Return the Gramian of each group of leaves of a linearized objective, by the chosen route."""
    return _ROUTES[method](linear, chunk_size, groups)


def contract_whole(
    linear: Linearized, method: str, chunk_size: int | None
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Return the Gramian `(m, m)` of all leaves, and the pullback of weights `(m,)`."""
    matrices, pullback = contract(linear, method, chunk_size, whole(linear))
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
    first: Linearized, second: Linearized, method: str, chunk_size: int | None
) -> Tensor:
    """Return the cross-Gramian of two linearized objectives, by the chosen route."""
    return _CROSS[method](first, second, chunk_size)


def _jacobian_route(linear: Linearized, chunk_size: int | None, groups: _tree.Groups) -> Gramian:
    """Build the Jacobian; its rows also serve the pullback."""
    flat = _tree.leaves(rows(linear, chunk_size))

    def pullback(weights: Tensor) -> PyTree:
        """Return `J^T weights`."""
        return linear.rebuild(_tree.in_order(_tree.weighted_sums(flat, groups, weights)))

    return Gramian(_tree.gramians(flat, groups), pullback)


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
    _check.fail(ValueError, "`method`", rule, "'layerwise'", remedy)


def _jacobian_cross(first: Linearized, second: Linearized, chunk_size: int | None) -> Tensor:
    """Contract the two Jacobians."""
    return _tree.cross_gramian(rows(first, chunk_size), rows(second, chunk_size))


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
            leaves = linear.pullback(row)
            found.update({i: leaves[i] for i in group})
        return linear.rebuild(_tree.in_order(found))

    return pullback


def validate(method: str, chunk_size: int | None) -> None:
    """Check the options that all transforms to Gramians share."""
    _check.choice("method", method, tuple(_ROUTES))
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
