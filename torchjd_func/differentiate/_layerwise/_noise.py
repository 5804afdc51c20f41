"""A little noise, the same whenever it is asked for: numbers that no coincidence survives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._functions import named

_GOLDEN = (1 + math.sqrt(5)) / 2
_LARGE = 2**20
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


def has_floats(args: Any) -> bool:
    """Say whether Python's numbers are among arguments, or in lists of these."""
    if isinstance(args, (list, tuple)):
        return any(map(has_floats, args))
    return type(args) is float


def elsewhere(x: Any) -> Any:
    """Return other numbers."""
    return 1.1 * x + 0.1


_ARITHMETIC = named(
    "add sub subtract mul multiply div divide true_divide rsub lerp __radd__ __rsub__ __rmul__"
)


class Swap:
    """Puts others in the place of data, wherever it comes from, and of constants.

    Args:
        change: What becomes of constants, the same of the same.
        pairs: The tensors among the arguments, and what came in their place.
    """

    def __init__(
        self, change: Callable[[Tensor], Tensor], pairs: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        self.change = change
        self.known = dict(pairs)

    def __call__(self, x: Tensor) -> Tensor:
        """Return what stands for a tensor; large ones take long, and hold no coefficients."""
        if x not in self.known:
            self.known[x] = self.change(x) if x.numel() <= _LARGE else x
        return self.known[x]


def leaky(out: Tensor, given: Sequence[Tensor]) -> Tensor:
    """Let something of each argument through, where a threshold keeps all of it back for now."""
    for x in given:
        if x.shape == out.shape and x.is_floating_point():
            out = out + 0.1 * x
    return out


THRESHOLDS = named("relu relu6 clamp clamp_min clamp_max clip hardtanh threshold maximum minimum")


def scattered(x: Tensor) -> Tensor:
    """Return numbers in (-1, 1) in the shape of `x`, scattered without a pattern."""
    count = torch.arange(1, x.numel() + 1, device=x.device, dtype=torch.float64)
    return (
        torch.sin(count * (1000 * _GOLDEN)).reshape(x.shape).to(_tree.accumulation_dtype(x.dtype))
    )
