"""A loss scale for float16 whose backward pass would underflow, as a value in the state.

    scale = jd.loss_scale.init()

    def step(params, state, scale, x):
        objective = jd.loss_scale.scaled(half_objective, scale)
        grads, losses, new_state = jd.grad_and_value(objective, rule)(state, params, x)
        scale = jd.loss_scale.update(scale, grads)
        new_params = {name: params[name] - lr * grads[name] for name in params}
        params, state = jd.loss_scale.keep(scale, (new_params, new_state), (params, state))
        return params, state, scale, losses

Losses, Jacobians, Gramians and gradients are those of the objective, in its own units: only the
backward pass runs on numbers `scale` times as large. A step whose gradients are not finite is
skipped and lowers the scale. `torch.bfloat16` has the range of float32 and needs none of this.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._objective import as_objective
from torchjd_func.differentiate._scaled import Scaled

PyTree = Any

__all__ = ["LossScaleState", "init", "keep", "scaled", "update"]

LIMITS = 2.0**-24, 2.0**126  # the least that float16 holds; one over this is no subnormal float32


class LossScaleState(NamedTuple):
    """The scale, and what it is adapted by."""

    scale: Tensor
    """`()` float32"""
    good_steps: Tensor
    """`()` int64, since the scale last changed"""
    finite: Tensor
    """`()` bool, whether the gradients of the latest step were"""


def init(scale: float = 2.0**15, *, device: torch.device | str | None = None) -> LossScaleState:
    """Return the initial loss scale.

    Args:
        scale: Factor of the losses in the backward pass; a power of two loses no digits.
        device: Where the parameters live.

    Returns:
        The state.

    Raises:
        ValueError: If `scale` is not positive.

    Example:
        >>> import torchjd_func as jd
        >>> jd.loss_scale.init().scale
        tensor(32768.)
    """
    _check.interval("scale", scale, 0, open_low=True)
    return LossScaleState(
        torch.tensor(scale, dtype=torch.float32, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.ones((), dtype=torch.bool, device=device),
    )


def scaled(fn: Callable[..., Any], state: LossScaleState) -> Scaled:
    """Make an objective that is differentiated at the present scale.

    Args:
        fn: An objective with float32 losses, such as `jd.cast_floating(fn, torch.float16)`.
        state: From `init` or `update`.

    Returns:
        An objective with the same losses, Jacobian and Gramian, by the same routes.

    Example:
        >>> import torch, torchjd_func as jd
        >>> half = jd.cast_floating(lambda w: (2.0**-13 * w).square().sum(), torch.float16)
        >>> jd.jac(half)(torch.ones(1))
        tensor([[0.]])
        >>> jd.jac(jd.loss_scale.scaled(half, jd.loss_scale.init()))(torch.ones(1))
        tensor([[2.9802e-08]])
    """
    _check.state_type("loss_scale", state, LossScaleState)
    return Scaled(as_objective(fn), state.scale)


def update(
    state: LossScaleState,
    grads: PyTree,
    *,
    growth: float | Tensor = 2.0,
    backoff: float | Tensor = 0.5,
    growth_interval: int | Tensor = 2000,
) -> LossScaleState:
    """Return the scale of the next step: lower after one that overflowed, higher after many good.

    It stays between `2**-24`, the least that float16 can hold, and `2**126`, so that it comes back
    after any number of steps that were not finite, or were zero.

    Args:
        state: From `init` or `update`.
        grads: Pytree of gradients.
        growth: Factor after `growth_interval` good steps.
        backoff: Factor after a step whose gradients are not finite.
        growth_interval: Number of good steps in a row before the scale grows.

    Returns:
        The next state; `state.finite` says whether this step is to be kept, see `keep`.

    Raises:
        TypeError: If `grads` hold other than floating-point tensors, or a factor is no number.
        ValueError: If a factor is out of range.

    Example:
        >>> import torch, torchjd_func as jd
        >>> state = jd.loss_scale.update(jd.loss_scale.init(), {"w": torch.tensor([torch.inf])})
        >>> state.scale, state.finite
        (tensor(16384.), tensor(False))
    """
    _check.state_type("loss_scale", state, LossScaleState)
    _check.interval("growth", growth, 1)
    _check.interval("backoff", backoff, 0, 1, open_low=True)
    _check.interval("growth_interval", growth_interval, 1)
    leaves = _tree.leaves(grads)
    _check.differentiable("`grads`", _tree.paths(grads), leaves, "Pass what jd.grad returned.")
    if any(leaf.is_meta for leaf in leaves):
        _check.one_device("`grads`, and the loss scale,", [*leaves, state.scale])
    flags = [leaf.isfinite().all() for leaf in leaves]
    finite = torch.stack(flags).all() if flags else torch.ones_like(state.finite)
    good_steps = torch.where(finite, state.good_steps + 1, 0)
    due = good_steps >= growth_interval
    factor = torch.where(due, growth, torch.where(finite, 1.0, backoff))
    scale = (state.scale * factor.to(state.scale.dtype)).clamp(*LIMITS)
    return LossScaleState(scale, torch.where(due, 0, good_steps), finite)


def keep(state: LossScaleState, new: PyTree, old: PyTree) -> PyTree:
    """Return `new` if the gradients of the latest step were finite, `old` if not.

    Args:
        state: From `update`.
        new: Pytree of tensors, such as the parameters and all states after the step.
        old: The same before the step.

    Returns:
        One of both, chosen without leaving the device.

    Raises:
        TypeError: If they hold other than tensors.
        ValueError: If they differ in structure or shapes.

    Example:
        >>> import torch, torchjd_func as jd
        >>> state = jd.loss_scale.update(jd.loss_scale.init(), torch.tensor(torch.nan))
        >>> jd.loss_scale.keep(state, {"w": torch.ones(1)}, {"w": torch.zeros(1)})
        {'w': tensor([0.])}
    """
    _check.state_type("loss_scale", state, LossScaleState)
    _check.same_structure("new", "old", _tree.same_structure(new, old))
    paths, leaves = _tree.paths(new), _tree.leaves(new)
    _check.tensors("new", paths, leaves)
    _check.tensors("old", paths, _tree.leaves(old))
    for path, after, before in zip(paths, leaves, _tree.leaves(old), strict=True):
        _check.same_shape("new", path, after, before)
    return _tree.map(partial(torch.where, state.finite), new, old)
