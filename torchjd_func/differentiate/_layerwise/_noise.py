"""A little noise, the same whenever it is asked for: numbers that no coincidence survives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._functions import named

_GOLDEN = (1 + math.sqrt(5)) / 2
_NOISE = 1e-2  # relative to each entry, and a tenth of it besides: zeros move, too


def near(x: Any) -> Any:
    """Return a tensor with a little noise; what is not dense and floating as it is."""
    dense = isinstance(x, Tensor) and x.layout == torch.strided
    if not dense or not (x.is_floating_point() or x.is_complex()):
        return x
    noise = _NOISE * (x.abs() + 0.1) * scattered(x)
    return x + noise.detach().to(x.dtype)


def moved(func: Callable[..., Any], numbers: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
    """Return arguments of arithmetic with others in the place of single numbers.

    A schedule may change them, and they may be zero at first: plans do not say what they are.

    Args:
        func: The operation.
        numbers: The tensors of one number that nothing made of others.
        args: Its arguments.
        kwargs: Its arguments by name.

    Returns:
        Both kinds of arguments.
    """

    def change(x: Any) -> Any:
        number = type(x) in (int, float) or any(x is other for other in numbers)
        return elsewhere(x) if number else x

    if func not in _ARITHMETIC:
        return args, kwargs
    return tuple(map(change, args)), {name: change(x) for name, x in kwargs.items()}


def elsewhere(x: Any) -> Any:
    """Return other numbers."""
    return 1.1 * x + 0.1


_ARITHMETIC = named(
    "add sub subtract mul multiply div divide true_divide rsub lerp __radd__ __rsub__ __rmul__"
)


def scattered(x: Tensor) -> Tensor:
    """Return numbers in (-1, 1) in the shape of `x`, scattered without a pattern."""
    count = torch.arange(1, x.numel() + 1, device=x.device, dtype=torch.float64)
    return (
        torch.sin(count * (1000 * _GOLDEN)).reshape(x.shape).to(_tree.accumulation_dtype(x.dtype))
    )
