"""Hand gradients to optimisers that read `.grad`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchjd_func import _check, _tree

PyTree = Any


def assign_grads_(module_or_params: nn.Module | PyTree, grads: PyTree) -> None:
    """Set `.grad` of parameters, for a `torch.optim` optimiser to step with.

    Args:
        module_or_params: A module, whose parameters are found by name, or a pytree of parameters.
        grads: For a module, a dict of the names of `jd.functionalize`; names left out keep their
            `.grad`. For a pytree, one of the same structure.

    Raises:
        ValueError: If a name is unknown, or a structure or shape differs.

    Example:
        >>> import torch, torchjd_func as jd
        >>> model = torch.nn.Linear(2, 1)
        >>> jd.interop.assign_grads_(model, {"bias": torch.ones(1)})
        >>> model.bias.grad
        tensor([1.])
    """
    if isinstance(module_or_params, nn.Module):
        params: PyTree = dict(module_or_params.named_parameters())
        _check.names("grads", grads, set(params) & set(grads))
        params = {name: params[name] for name in grads}
    else:
        params = module_or_params
    _check.same_structure("grads", _tree.same_structure(params, grads))
    paths = _tree.paths(params)
    pairs = list(zip(_tree.leaves(params), _tree.leaves(grads), strict=True))
    for path, (param, grad) in zip(paths, pairs, strict=True):
        _check.same_shape("grads", path, grad, param)
    for param, grad in pairs:
        _assign(param, grad)


def _assign(param: Tensor, grad: Tensor) -> None:
    """Set one gradient, detached, in the dtype and on the device of its parameter."""
    param.grad = grad.detach().to(param)
