"""Jacobians of a vector of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchjd_func import _check
from torchjd_func.differentiate._layerwise import jacobian
from torchjd_func.differentiate._linearize import linearize
from torchjd_func.differentiate._pullback import Linearized, basis, pull_rows

PyTree = Any


def jac(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Jacobian.

    One forward pass; then the pullback is mapped over the `m` unit cotangents.

    Args:
        fn: Objective: returns a tensor of any shape, or a pytree of tensors, `m` losses in all.
        argnums: Which positional argument(s) to differentiate.
        has_aux: Whether `fn` returns `(losses, aux)`.
        chunk_size: How many rows to compute at a time; `None` for all, 1 for a plain loop (less
            memory, and no batching rules needed).

    Returns:
        `f(*args) -> jac`, a pytree like the argument with leaves `(m, *leaf.shape)`; `(jac, aux)`
        with aux. Rows are in leaf order of the losses (sorted keys, row-major). With
        `jd.multitask`, the Jacobian of the shared parameters.

    Raises:
        TypeError: If the argument holds other than floating-point tensors, or losses are not
            floating-point.
        ValueError: If `argnums` or `chunk_size` is out of range.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.jac(lambda x: {"a": x.sum(), "b": x.prod()})(torch.tensor([2.0, 3.0]))
        tensor([[1., 1.],
                [3., 2.]])
    """
    _check.chunk_size(chunk_size)

    def jac_fn(*args: Any) -> Any:
        """Return the Jacobian (and aux)."""
        linear = linearize(fn, args, argnums, has_aux, "auto")
        jacobian = rows(linear, chunk_size)
        return (jacobian, linear.aux) if has_aux else jacobian

    return jac_fn


def jac_and_value(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Jacobian and its losses.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        chunk_size: As for `jd.jac`.

    Returns:
        `f(*args) -> (jac, losses)`, losses in the objective's own structure;
        `(jac, (losses, aux))` with aux.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.jac_and_value(lambda x: x.square())(torch.tensor([1.0, 3.0]))
        (tensor([[2., 0.],
                 [0., 6.]]), tensor([1., 9.]))
    """
    _check.chunk_size(chunk_size)

    def jac_and_value_fn(*args: Any) -> Any:
        """Return the Jacobian and the losses (and aux)."""
        linear = linearize(fn, args, argnums, has_aux, "auto")
        return rows(linear, chunk_size), value(linear, has_aux)

    return jac_and_value_fn


def rows(linear: Linearized, chunk_size: int | None) -> PyTree:
    """Return the Jacobian."""
    return linear.rebuild(row_leaves(linear, chunk_size))


def row_leaves(linear: Linearized, chunk_size: int | None) -> list[Tensor]:
    """Return its leaves: the pullback of each unit cotangent, or what layers recorded of it."""
    if linear.layers is not None:
        return [jacobian(linear.layers, leaf) for leaf in range(len(linear.paths))]
    return pull_rows(linear.pullback, basis(linear.vector), chunk_size, linear.own)


def value(linear: Linearized, has_aux: bool) -> Any:
    """Return what `*_and_value` transforms return last."""
    return (linear.losses, linear.aux) if has_aux else linear.losses
