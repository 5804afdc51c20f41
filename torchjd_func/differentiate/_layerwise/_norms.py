"""Norms whose gradients vmap in mixed precision, and have derivatives of their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, maybe_current_level
from torch.autograd import forward_ad
from torch.nn import functional as F

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._functions import name_of


def norm(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Normalise in the widest precision of the arguments."""
    # So do torch's kernels, but their backward passes take no mixture under vmap (torch 2.13, CPU).
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    dtypes = {x.dtype for x in given}
    x = args[0] if args else kwargs["input"]
    alone = len(given) % 2 == 0  # weight or bias
    again = torch.compiler.is_compiling() or alone or _is_nested()
    run = functools.partial(_differentiable_twice, func) if again else func
    if len(dtypes) == 1 or (x.is_cuda and func in _CAST_ON_GPU):
        return run(*args, **kwargs)
    wide = functools.reduce(torch.promote_types, dtypes)
    args = tuple(_cast(x, wide) for x in args)
    out = run(*args, **{name: _cast(x, wide) for name, x in kwargs.items()})
    return out.to(x.dtype)


def _differentiable_twice(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Normalise so that derivatives have derivatives.

    Kernels keep mean and deviation, of which torch forgets that they depend on the input: in what
    is pushed forward, and in the gradient of the weight, where it is mapped over cotangents (torch
    2.13). Nor has the gradient of a bias without a weight a derivative.

    Returns:
        What the operation returns.
    """
    name = str(name_of(func))
    given: dict[str, Any] = dict(zip(_NAMED[name], args, strict=False)) | kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if _is_nested():
        return _STANDARDISED[name](**given)
    looks = weight is not None and torch.compiler.is_compiling()
    if not looks and (weight is not None or bias is None):
        return func(*args, **kwargs)
    x = given["input"]
    wide = x if given.get("running_mean") is not None else _wide(x)
    given |= {"input": wide, "weight": None, "bias": None}
    out = _affine(func(**given), weight, bias, name == "layer_norm")
    return out if func in _CAST_ON_GPU and _is_cast(x) else out.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in the precision that kernels work in."""
    return x.to(_tree.accumulation_dtype(x.dtype))


def _is_nested() -> bool:
    """Say whether derivatives of derivatives may be asked for; a compiler sees one kind."""
    if forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling() or (maybe_current_level() or 0) < 2:
        return False
    levels = get_interpreter_stack() or ()
    return sum(level.key() != TransformType.Vmap for level in levels) > 1


def _is_cast(x: Tensor) -> bool:
    """Say whether autocast keeps norms in float32."""
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def _affine(out: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool) -> Tensor:
    """Scale and shift the last dimensions, or channels."""
    shape = (-1, *[1] * (out.ndim - 2))
    weight, bias = (x if x is None or last else x.reshape(shape) for x in (weight, bias))
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _standardised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """Return numbers of mean 0 and variance 1."""
    x = _wide(x)
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _channels(
    x: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Standardise, then scale and shift channels."""
    return _affine(_standardised(x, dims, eps), weight, bias, False).to(x.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Spell `F.layer_norm` out."""
    out = _standardised(input, [*range(-len(normalized_shape), 0)], eps)
    out = _affine(out, weight, bias, True)
    return out if _is_cast(input) else out.to(input.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Spell `F.batch_norm` out where it takes the statistics of the batch."""
    running = running_mean, running_var
    if not training:
        return F.batch_norm(input, *running, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.batch_norm(input.detach(), *running, None, None, True, momentum, eps)
    return _channels(input, [0, *range(2, input.ndim)], weight, bias, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Spell `F.instance_norm` out where it takes the statistics of instances."""
    running = running_mean, running_var
    if not use_input_stats:
        return F.instance_norm(input, *running, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), *running, None, None, True, momentum, eps)
    return _channels(input, [*range(2, input.ndim)], weight, bias, eps)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Spell `F.group_norm` out, which no graph pushes forward (torch 2.13)."""
    groups = _standardised(input.unflatten(1, (num_groups, -1)).flatten(2), [2], eps)
    out = _affine(groups.reshape(input.shape), weight, bias, False)
    return out if _is_cast(input) else out.to(input.dtype)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """Return a tensor in a precision, itself if it has it, and anything else as it is."""
    return x.to(dtype) if isinstance(x, Tensor) else x


_STANDARDISED = {
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
}
_NAMED = {name: tuple(inspect.signature(fn).parameters) for name, fn in _STANDARDISED.items()}
NORMS = (F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm)
_CAST_ON_GPU = (F.layer_norm, F.group_norm)  # by autocast
