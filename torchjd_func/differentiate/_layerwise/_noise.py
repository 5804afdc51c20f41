"""A little noise, the same whenever it is asked for: numbers that no coincidence survives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree

_GOLDEN = (1 + math.sqrt(5)) / 2
_NOISE = 1e-2  # relative to each entry, and a tenth of it besides: zeros move, too


def near(x: Any) -> Any:
    """Return a tensor with a little noise; what is not dense and floating as it is."""
    dense = isinstance(x, Tensor) and x.layout == torch.strided
    if not dense or not (x.is_floating_point() or x.is_complex()):
        return x
    noise = _NOISE * (x.abs() + 0.1) * scattered(x)
    return x + torch.where(torch.isfinite(x), noise.detach().to(x.dtype), 0)  # masks have none


def scattered(x: Tensor) -> Tensor:
    """Return numbers in (-1, 1) in the shape of `x`, scattered without a pattern."""
    count = torch.arange(1, x.numel() + 1, device=x.device, dtype=torch.float64)
    return (
        torch.sin(count * (1000 * _GOLDEN)).reshape(x.shape).to(_tree.accumulation_dtype(x.dtype))
    )
