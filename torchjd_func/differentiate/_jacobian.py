"""Jacobians of a vector of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchjd_func import _check
from torchjd_func._precision import full_precision
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._linearized import Linearized, rows_of, value
from torchjd_func.differentiate._request import Request, Where
from torchjd_func.differentiate._verb import linearize, without_losses

PyTree = Any


def jac(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Jacobian.

    One forward pass; then the pullback is mapped over the `m` unit cotangents.

    Args:
        fn: Objective: returns a tensor of any shape, or a pytree of tensors, `m` losses in all.
        argnums: Which positional argument(s) to differentiate.
        has_aux: Whether `fn` returns `(losses, aux)`.
        chunk_size: How many rows to compute at a time; `None` for all, 1 for a plain loop (less
            memory, and no batching rules needed).
        where: Predicate of the path of a leaf, such as `"encoder.0.weight"`: these leaves alone are
            differentiated, and `None` is in the place of others.

    Returns:
        `f(*args, present=None, size=None, **kwargs) -> jac`, a pytree like the argument with leaves
        `(m, *leaf.shape)`; `(jac, aux)` with aux. Rows are in leaf order of the losses (sorted
        keys, row-major). With `jd.multitask`, the Jacobian of the shared parameters.

        Keyword arguments go to the objective, but these. `present`: which losses there are, `(m,)`
        bool, or a pytree of bools like the losses; absent ones have rows of zeros, and may be NaN.
        (Python bools cut their graph off. With a tensor one pullback goes through all losses, so
        that zero times the derivatives of an absent loss must be zero: divide by
        `count.clamp(min=1)`, not by a count of 0.) `size`: how many examples this process has, for
        what `jd.distributed` makes of a rule or of an objective.

        Values in, values out: whatever plain autograd tracks is detached, what `torch.func` tracks
        is not.

    Raises:
        TypeError: If the argument holds other than floating-point tensors, or losses are not
            floating-point.
        ValueError: If `argnums` or `chunk_size` is out of range, `where` names no leaf, or no loss
            depends on the argument.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.jac(lambda x: {"a": x.sum(), "b": x.prod()})(torch.tensor([2.0, 3.0]))
        tensor([[1., 1.],
                [3., 2.]])
    """
    run = jac_and_value(fn, argnums, has_aux=has_aux, chunk_size=chunk_size, where=where)
    return without_losses(run, has_aux)


def jac_and_value(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Jacobian and its losses.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        chunk_size: As for `jd.jac`.
        where: As for `jd.jac`.

    Returns:
        `f(*args, present=None, size=None, **kwargs) -> (jac, losses)`, losses in the objective's
        own structure; `(jac, (losses, aux))` with aux.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.jac_and_value(lambda x: x.square())(torch.tensor([1.0, 3.0]))
        (tensor([[2., 0.],
                 [0., 6.]]), tensor([1., 9.]))
    """
    _check.chunk_size(chunk_size)

    options = Request(argnums, has_aux, "auto", chunk_size, where, alone=True)

    def jac_and_value_fn(*args: Any, **kwargs: Any) -> Any:
        """Return the Jacobian and the losses (and aux)."""
        linear = linearize(fn, args, kwargs, options)
        with full_precision():
            return detached((rows(linear), value(linear, has_aux)))

    return jac_and_value_fn


def rows(linear: Linearized) -> PyTree:
    """Return the Jacobian."""
    return linear.leaves.rebuild(rows_of(linear))
