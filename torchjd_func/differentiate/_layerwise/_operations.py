"""The operations of a run: how to know a run again, and where examples lie in each tensor.

An objective is watched with two batches, one example apart. Its operations are the same, and the
axis of a tensor whose length changes is that of the examples, or of as many parts of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._functions import name_of
from torchjd_func.differentiate._layerwise._local import ELEMENTWISE
from torchjd_func.differentiate._layerwise._plan import LOST, Axis
from torchjd_func.differentiate._layerwise._sources import tensors_in


class Operations:
    """Numbers the tensors of a run, and lists its operations.

    Args:
        inputs: Tensors that are there before the run.
        size: How many examples there are.
        other: The operations of a run with another batch, if axes are wanted.
    """

    def __init__(
        self, inputs: Sequence[Tensor], size: int = 0, other: Operations | None = None
    ) -> None:
        self.size = size
        self.other = other
        self.known = {x: number for number, x in enumerate(inputs)}
        self.shapes = [tuple(x.shape) for x in inputs]
        self.steps: list[Any] = []
        self.token: list[Any] = []  # marks the tensors of this run
        self.lost = False  # whether the other run went another way

    def begin(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Note an operation and what it is applied to."""
        if self.other is not None:
            place = len(self.steps)
            there = self.other.steps
            self.lost |= place >= len(there) or there[place][0] != name_of(func)
        if torch.compiler.is_compiling():
            self.steps.append((name_of(func),))
            return
        loose = _loose if func in ELEMENTWISE else _index if func is Tensor.__getitem__ else None
        given = (self._describe(args, loose), self._describe(kwargs, loose))
        self.steps.append((name_of(func), torch.is_grad_enabled(), *given))

    def end(self, out: Any, given: Sequence[Tensor]) -> None:
        """Number the outputs of an operation."""
        parts = tensors_in(out)
        if torch.compiler.is_compiling() and any(self.number(x) is None for x in given):
            return  # nothing is known of what a transform within the objective hands out
        for x in parts:
            if torch.compiler.is_compiling() or any(x is other for other in given):
                self.known[x] = len(self.shapes)
            else:
                x._operation = (self.token, len(self.shapes))  # pyright: ignore
            self.shapes.append(tuple(x.shape))
        if not torch.compiler.is_compiling():
            self.steps.append(tuple(x.shape for x in parts))

    def number(self, x: Tensor) -> int | None:
        """Return the number of a tensor, or `None` if no operation that was seen made it."""
        if x in self.known or torch.compiler.is_compiling():
            return self.known.get(x)
        token, number = getattr(x, "_operation", (None, None))
        return number if token is self.token else None

    def axis(self, x: Tensor) -> Axis:
        """Return where the examples of a tensor lie, `None` if it has none, or `LOST`."""
        number = self.number(x)
        if number is None:
            return LOST if self.size and torch.compiler.is_compiling() else None
        return self._compare(number, tuple(x.shape))

    def axis_next(self, out: Any) -> Axis:
        """Return where the examples lie in what the operation that runs now returns."""
        parts = tensors_in(out)
        axes = {self._compare(len(self.shapes) + i, tuple(x.shape)) for i, x in enumerate(parts)}
        return axes.pop() if len(axes) == 1 else LOST

    def _compare(self, number: int, shape: tuple[int, ...]) -> Axis:
        """Find the axis whose length is another one with another batch."""
        if self.size == 0:
            return None
        if self.other is None or self.lost or number >= len(self.other.shapes):
            return LOST
        there, more = self.other.shapes[number], self.other.size
        if len(there) != len(shape):
            return LOST
        axes = [axis for axis, pair in enumerate(zip(shape, there, strict=True)) if pair[0] != pair[1]]
        if not axes:
            return None
        axis = axes[0]
        fits = shape[axis] % self.size == 0 and shape[axis] * more == there[axis] * self.size
        return axis if len(axes) == 1 and fits else LOST

    def _describe(self, x: Any, loose: Callable[[Any], Any] | None) -> Any:
        """Return what is the same of an argument whenever the run is the same."""
        if isinstance(x, Tensor):
            return self.number(x)
        if isinstance(x, (list, tuple)):
            return tuple(self._describe(part, loose) for part in x)
        if isinstance(x, dict):
            return tuple((key, self._describe(part, loose)) for key, part in x.items())
        if isinstance(x, slice):
            return (slice, *(self._describe(part, None) for part in (x.start, x.stop, x.step)))
        if loose is not None:
            return loose(x)
        return x if isinstance(x, (bool, int, str, type(None), torch.dtype)) else type(x)


def _loose(x: Any) -> Any:
    """Numbers in arithmetic do not matter."""
    return type(x)


def _index(x: Any) -> Any:
    """Which entry an index takes does not matter."""
    return type(x) if type(x) is int else x if isinstance(x, (bool, type(None))) else type(x)
