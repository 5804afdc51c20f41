"""Rows from factors in half precision on a device, which multiplies such and adds up in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _host

_HALF = (torch.bfloat16, torch.float16)


def serves(left: Tensor, right: Tensor) -> bool:
    """Say whether factors need not be cast up first; tensor cores are faster by an order."""
    # Their product has no derivative and no rule for vmap, and compiled code may be asked for both
    # without saying so (torch 2.13).
    return is_half(left, right) and _host.plain(left, right)


def is_half(left: Tensor, right: Tensor) -> bool:
    """Say whether a device has both factors in half precision."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in _HALF


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right`, `(e, g, q, p)`, in float32 where half precision need not be cast."""
    if not serves(left, right):
        return left @ right
    shape = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    a, b = (x.expand(*shape, *x.shape[-2:]).flatten(0, -3) for x in (left, right))
    return torch.unflatten(on_tensor_cores(a, b), 0, shape)


def on_tensor_cores(a: Tensor, b: Tensor) -> Tensor:
    """Multiply `(n, q, t)` and `(n, t, p)` on a CUDA device."""
    return torch.bmm(a, b, out_dtype=torch.float32)
