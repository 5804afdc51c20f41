"""Gates: operations that keep entries of their arguments out of what they return, for now.

A threshold, the larger of two, the index of the largest: where the derivative is zero, no proof on
one batch tells what would come through on another. So it is seen where that is, and the gate is
opened, or the question answered as for other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._functions import may_write
from torchjd_func.differentiate._layerwise._noise import scattered
from torchjd_func.differentiate._layerwise._operations import INFINITE, Operation
from torchjd_func.differentiate._layerwise._sources import substitute, tensors_in

# What torch raises where an operation does not take its arguments.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def unwritten(operation: Operation) -> Operation:
    """Return an operation with a copy of what it may write to, made of parameters as that is."""
    func, args, kwargs, given = operation
    if not given or not may_write(func, args, kwargs):
        return operation
    copy = given[0].clone()
    args, kwargs = _replaced((args, kwargs), given[:1], [copy])
    return Operation(func, args, kwargs, [copy, *given[1:]])


def holds_back(operation: Operation, out: Any) -> bool:
    """Say whether entries of an argument that is made of parameters make no difference."""
    made = [x for x in _of(out) if x.requires_grad]
    if not made or any(x.is_meta or _is_part(x, operation.given) for x in made):
        return False
    return any(some(grad == 0) for grad in _gradients(operation))


def differ(first: Operation, second: Operation) -> bool:
    """Say whether the derivative of an operation is another one with other numbers, but finite."""
    pairs = list(zip(_gradients(first), _gradients(second), strict=False))
    sound = not any(some(~torch.isfinite(b) & torch.isfinite(a)) for a, b in pairs)
    return sound and any(some(a != b) for a, b in pairs)


def _gradients(operation: Operation) -> list[Tensor]:
    """Return gradients by the arguments that are made of parameters; none where that fails."""
    func, args, kwargs, given = operation
    traced = list(dict.fromkeys(x for x in given if x.requires_grad))

    def run(*values: Tensor) -> list[Tensor]:
        inner = _replaced((args, kwargs), traced, [x.clone() for x in values])
        found = tensors_in(func(*inner[0], **inner[1]))
        return [x for x in found if x.is_floating_point() or x.is_complex()]

    try:
        outs, pull = torch.func.vjp(run, *(x.detach() for x in traced))[:2]
        return list(pull([scattered(x).to(x.dtype) for x in outs]))
    except REFUSALS:
        return []


def opened(
    run: Callable[..., Any], operation: Operation, out: Any, traced: Sequence[Tensor]
) -> Any:
    """Add to what an operation returned some of what it would with all of its gates open.

    A little of each argument passes by it, and of what it makes of them at other values, where
    other entries are the larger ones.

    Args:
        run: Runs it.
        operation: It, and what it was applied to.
        out: What it returned.
        traced: Those of its arguments that are made of parameters.

    Returns:
        The same, and something of each argument.
    """
    others = _elsewhere(run, operation, traced) or [None] * len(_of(out))
    pairs = zip(_of(out), others, strict=True) if len(others) == len(_of(out)) else ()
    return _filled(out, [_more(x, other, traced) for x, other in pairs])


def answered(run: Callable[..., Any], operation: Operation, out: Any) -> Any:
    """Return what an operation makes of other numbers, if that has the same shapes."""
    others = _elsewhere(run, operation, [x for x in operation.given if x.is_floating_point()])
    alike = [x.shape for x in _of(out)] == [x.shape for x in others]
    return _filled(out, others if alike else [])


def _elsewhere(
    run: Callable[..., Any], operation: Operation, moved: Sequence[Tensor]
) -> list[Tensor]:
    """Return what an operation makes of numbers in (0, 1), with the derivatives of what is moved.

    Returns:
        Tensors; none if the operation does not take such numbers.
    """
    values = []
    for x in moved:
        there = (x - x.detach()) + ((1 + scattered(x)) / 2).to(x.dtype)
        values.append(torch.where(_is_mask(x), x, there))
    args, kwargs = _replaced((operation.args, operation.kwargs), moved, values)
    try:
        return _of(run(operation.func, *args, **kwargs))
    except REFUSALS:
        return []


def _of(out: Any) -> list[Tensor]:
    """Return what an operation returned, if that is tensors alone; else nothing."""
    parts = list(out) if isinstance(out, (list, tuple)) else [out]
    return parts if all(isinstance(x, Tensor) for x in parts) else []


def _filled(out: Any, parts: list[Tensor]) -> Any:
    """Return others in the place of all that an operation returned, if there are any."""
    if not parts or isinstance(out, Tensor):
        return parts[0] if parts else out
    kind: Any = type(out)
    return kind._make(parts) if hasattr(kind, "_make") else kind(parts)


def _more(x: Tensor, other: Tensor | None, traced: Sequence[Tensor]) -> Tensor:
    """Return an output with a little of another one, and of all arguments of its shape."""
    if not x.is_floating_point():
        return x
    alike = [y for y in traced if y.shape == x.shape and y.dtype == x.dtype]
    passed = [torch.where(_is_mask(y), 0, y) for y in alike]
    if other is not None and other.shape == x.shape and not some(~torch.isfinite(other)):
        passed.append(other)
    return x + 0.1 * sum(passed)


def _is_mask(x: Tensor) -> Tensor:
    """Say which entries are infinite, or as good as that: what they leave out stays out."""
    return ~(x.abs() < min(INFINITE, torch.finfo(x.dtype).max / 2))


def _is_part(x: Tensor, given: Sequence[Tensor]) -> bool:
    """Say whether a tensor is a view of what an operation is applied to."""
    try:
        places = [torch.func.debug_unwrap(y, recurse=True).untyped_storage() for y in (x, *given)]
    except REFUSALS:  # sparse ones have none
        return False
    return places[0]._cdata in [place._cdata for place in places[1:]]


def some(flags: Tensor) -> bool:
    """Say whether some flag is set, at some of the places that an outer transform maps over."""
    return bool(torch.func.debug_unwrap(flags, recurse=True).any())


def _replaced(arguments: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """Return arguments with others in the place of some tensors."""
    pairs = dict(zip(old, new, strict=True))
    return substitute(arguments, lambda x: pairs.get(x, x))
