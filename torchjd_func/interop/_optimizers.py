"""Hand gradients to optimisers that read `.grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchjd_func import _check
from torchjd_func.interop import _targets

PyTree = Any


def assign_grads_(
    target: nn.Module | PyTree, grads: PyTree, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Set `.grad` of parameters, for a `torch.optim` optimiser to step with.

    Nothing is added to what `.grad` was, so nothing has to be zeroed before; `zero_grad()` after it
    takes the gradients away. They are copied, so that clipping and unscaling, which work in place,
    change no others. `None` sets `.grad` to `None`, for an optimiser to skip the parameter: it is
    then neither moved nor decayed, as the head of a task without examples should be.

    Args:
        target: A module, a tree of modules such as `(trunk, {"a": head})`, or a tree of parameters.
        grads: For a module, a dict by the names of `jd.functionalize`; names left out keep their
            `.grad`, but for what is frozen. A tree of such, or of gradients, for a tree. `None` for
            a parameter, or in the place of a whole part, stands for no gradient. Where one
            parameter stands in two places, its gradients are added.
        optimizer: The one that is to step; to check that it has all these parameters.

    Raises:
        TypeError: If `optimizer` is not one, such as a list of several: call it once for each; or
            if the gradient of a real parameter is complex.
        ValueError: If a name is unknown, a structure or shape differs, a parameter is not a leaf
            that requires a gradient, such as those of `jd.functionalize`, which are detached, or is
            not one of `optimizer`. Nothing is assigned then.

    Example:
        >>> import torch, torchjd_func as jd
        >>> model = torch.nn.Linear(2, 1)
        >>> jd.interop.assign_grads_(model, {"bias": torch.ones(1), "weight": None})
        >>> model.bias.grad, model.weight.grad
        (tensor([1.]), None)
    """
    target = _targets.listed(target)
    found = list(_targets.pairs(target, grads))
    owned = None if optimizer is None else _owned(optimizer)
    for path, param, grad in found:
        _check.leaf_parameter("target", path, param)
        if grad is not None:
            _check.assignable(path, param, grad)
        if owned is not None:
            _check.owned(path, id(param) in owned)
    totals: dict[int, tuple[Tensor, Tensor | None]] = {}
    for _, param, grad in found:
        _, total = totals.get(id(param), (param, None))
        totals[id(param)] = param, _added(param, total, grad)
    for param, total in totals.values():
        param.grad = total
    for param in _targets.frozen((target, _parameters(optimizer))):
        param.grad = None  # an old one would move it


def _owned(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the identities of the parameters of an optimiser."""
    _check.optimizer(optimizer)
    return set(map(id, _parameters(optimizer)))


def _parameters(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Return the parameters of an optimiser."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [param for group in groups for param in group["params"]]


def _added(param: Tensor, total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Return a sum of gradients that no one else holds."""
    if grad is None:
        return total
    own = like_parameter(param, grad)
    return own if total is None else total.add_(own)


def like_parameter(param: Tensor, grad: Tensor) -> Tensor:
    """Return a copy of a gradient, with the layout, the dtype and the device of its parameter."""
    return torch.empty_like(param, requires_grad=False).copy_(grad.detach())
