"""Operations that only move entries of a parameter, such as `repeat` and `weight[index]`.

They are seen, not listed: the operation is run on the numbers of the entries, which say where each
entry of its output comes from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._order import REFUSALS
from torchjd_func.differentiate._layerwise._sources import Source, substitute

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are spread evenly, modulo 1
ENTRIES, ROWS = "entries", "rows"
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def moves(call: Call, parameter: Tensor, expanded: bool, axis: int, size: int) -> str:
    """Say what an operation takes of a parameter, if it does no more, whatever its values.

    Args:
        call: The operation and its arguments.
        parameter: Which of them it is.
        expanded: Whether it is repeated for each example.
        axis: Where the examples lie in what the operation returns.
        size: How many there are.

    Returns:
        `ENTRIES`; `ROWS` if it takes whole rows of a matrix; or nothing.
    """
    others: list[Tensor] = []
    one = parameter.detach()[:1] if expanded else parameter.detach()

    def apply(value: Tensor) -> Any:
        """Run it on a value of the parameter, and on copies of all else."""

        def replace(x: Tensor) -> Tensor:
            if x is parameter:
                return value
            others.append(x)
            return x.detach().clone()

        func, args, kwargs = substitute(call, replace)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of integers in arithmetic
            return func(*args, **kwargs)

    try:
        values, places = _of_all_sizes(one), numbers(one.shape, one.device)
        places, moved = apply(places.expand(parameter.shape)), apply(values.expand(parameter.shape))
        if places.dtype != torch.int64 or not torch.equal(values.flatten()[places], moved):
            return ""
        each = torch.unflatten(places, axis, (size, -1)).movedim(axis, 0)
        if not others and not torch.equal(each, each[:1].expand(each.shape)):
            return ""
        return ROWS if parameter.ndim == 2 and _whole(apply, places, one.shape) else ENTRIES
    except (*REFUSALS, AttributeError):  # it takes no integers, or returns no tensor
        return ""


def origins(call: Call, arrays: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """Return the number of the entry that each entry of the output is.

    Args:
        call: The operation and its arguments, with sources and places for tensors.
        arrays: What lies at the places.
        numbers: Those of the entries of the parameter.
    """

    def replace(part: Any) -> Any:
        return numbers if isinstance(part, Source) else arrays[part.number]

    func, args, kwargs = substitute(call, replace)
    return func(*args, **kwargs)


def rows(places: Tensor, cotangent: Tensor, shape: Sequence[int]) -> Tensor:
    """Return gradient rows `(e, *shape)` of a parameter, by those `(e, k)` of its entries."""
    zeros = cotangent.new_zeros(len(cotangent), math.prod(shape))
    return torch.unflatten(zeros.scatter_add(1, places, cotangent), 1, shape)


def numbers(shape: Sequence[int], device: torch.device) -> Tensor:
    """Number entries."""
    return torch.arange(math.prod(shape), device=device).reshape(shape)


def _whole(apply: Callable[[Tensor], Any], places: Tensor, shape: Sequence[int]) -> bool:
    """Say whether whole rows of a matrix are taken, by their numbers alone."""
    try:
        starts = apply(numbers((shape[0], 1), places.device)) * shape[1]
    except REFUSALS:
        return False
    if starts.shape[-1:] != (1,):
        return False
    return torch.equal(starts + numbers(shape[1:], places.device), places)


def _of_all_sizes(like: Tensor) -> Tensor:
    """Return values of both signs, from the smallest to the largest."""
    info = torch.finfo(like.dtype)
    count = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64)
    low, high = math.log(info.tiny), math.log(info.max)
    sizes = torch.exp(low + (high - low) * (count * _GOLDEN % 1))
    signs = torch.where(count * math.sqrt(2) % 1 < 0.5, -1.0, 1.0)
    return (signs * sizes).to(like.dtype).reshape(like.shape)
