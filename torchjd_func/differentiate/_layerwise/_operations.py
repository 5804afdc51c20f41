"""The operations of a run: how to know a run again, and where examples lie in each tensor.

An objective is watched with two batches, one example apart. Its operations are the same, and the
axis of a tensor whose length changes is that of the examples, or of as many parts of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Number, Real
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.differentiate._layerwise._draws import States
from torchjd_func.differentiate._layerwise._functions import name_of
from torchjd_func.differentiate._layerwise._local import ELEMENTWISE
from torchjd_func.differentiate._layerwise._plan import LOST, Axis
from torchjd_func.differentiate._layerwise._sources import tensors_in


class Operation(NamedTuple):
    """An operation of a run, and the tensors that it is applied to."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]


class Operations:
    """Numbers the tensors of a run, and lists its operations.

    Args:
        inputs: Tensors that are there before the run.
        size: How many examples there are.
        other: The operations of a run with another batch, if axes are wanted.
        generators: Takes the states of random generators before operations are handed these.
        planned: Whether there is a plan, whose numbers may stand for any.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        size: int = 0,
        other: Operations | None = None,
        generators: States | None = None,
        *,
        planned: bool = False,
    ) -> None:
        self.size = size
        self.other = other
        self.planned = planned
        self.generators = {} if generators is None else generators
        self.inputs = len(inputs)
        self.known = {x: number for number, x in enumerate(inputs)}
        self.shapes: list[Any] = [x.shape for x in inputs]
        self.strangers: dict[Tensor, int] = {}  # what no operation made that was seen, in order
        self.names: list[str] = []
        self.steps: list[Any] = []  # operations and what they return
        self.token: list[Any] = []  # marks the tensors of this run
        self.forks: int | None = None  # how many tensors there were when the other run left
        self.loosened = False  # whether numbers of the latest operation may change
        self.exactly: Any = None  # the latest, with the entry that it takes, if that may change

    def begin(self, func: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
        """Note an operation and what it is applied to; return the tensors among that."""
        name = name_of(func)
        if self.other is not None and self.forks is None:
            place, there = len(self.names), self.other.names
            if place >= len(there) or there[place] != name:
                self.forks = len(self.shapes)
        self.names.append(name)
        given: list[Tensor] = []
        loose = func in ELEMENTWISE.functions and _is_arithmetic(args, kwargs)
        index = name == "__getitem__" and not self.planned
        self.loosened = False
        described = tuple([self._describe(x, loose, index, given) for x in args])
        named = self._describe(kwargs, loose, False, given) if kwargs else ()
        if kwargs and "out" in kwargs:
            self.check_written(name, kwargs["out"])
        self.steps.append((name, torch.is_grad_enabled(), len(given), described, named))
        self.exactly = None
        if index and self.loosened:
            exactly = tuple([self._describe(x, False, False, []) for x in args])
            self.exactly = (*self.steps[-1][:3], exactly, named)
        return given

    def end(self, out: Any, given: Sequence[Tensor]) -> None:
        """Number the outputs of an operation."""
        parts = [out] if isinstance(out, Tensor) else tensors_in(out)
        of_examples = self.exactly is not None and self.axis(given[0]) is not None
        if of_examples and self.axis_next(out) in (None, LOST):  # it may take an example
            self.steps[-1] = self.exactly
        for x in parts:
            number, marked = len(self.shapes), getattr(x, "_operation", None)
            same = [place for place, other in enumerate(given) if x is other]
            if same:
                self.steps.append(same[0])
            if same and (marked is None or marked[0] is not self.token):
                self.known[x] = number  # an operation in place, on what was there before
            else:
                x._operation = (self.token, number)  # pyright: ignore
            self.shapes.append(x.shape)
            self.steps.append(x.shape)

    def check_written(self, name: str, out: Any) -> None:
        """Check that an operation writes to tensors of this run alone; torch.func does not look."""
        for x in tensors_in((out,)):
            number = self.number(x)
            if number is None or number < self.inputs:
                _check.not_written(name)

    def close(self, outputs: Sequence[Tensor]) -> None:
        """Note what the run returns."""
        self.steps.append(tuple([self._describe(x, False, False, []) for x in outputs]))

    def number(self, x: Tensor) -> int | None:
        """Return the number of a tensor, or `None` if no operation that was seen made it."""
        marked = getattr(x, "_operation", None)
        if marked is not None and marked[0] is self.token:
            return marked[1]
        return self.known.get(x)

    def axis(self, x: Tensor) -> Axis:
        """Return where the examples of a tensor lie, `None` if it has none, or `LOST`."""
        number = self.number(x)
        if number is not None:
            return self._compare(x.shape, self._there(number), number)
        if x not in self.strangers:
            return None
        there = [] if self.other is None else list(self.other.strangers)
        place = self.strangers[x]
        return self._compare(x.shape, there[place].shape if place < len(there) else None)

    def along(self) -> tuple[Axis, ...]:
        """Return where the examples lie in each of the tensors that were there before the run."""
        pairs = ((self.shapes[number], self._there(number)) for number in range(self.inputs))
        return tuple([self._compare(shape, there) for shape, there in pairs])

    def axis_next(self, out: Any) -> Axis:
        """Return where the examples lie in what the operation that runs now returns."""
        parts = tensors_in(out)
        numbers = range(len(self.shapes), len(self.shapes) + len(parts))
        pairs = zip(parts, numbers, strict=True)
        axes = {self._compare(x.shape, self._there(number), number) for x, number in pairs}
        return axes.pop() if len(axes) == 1 else LOST

    def _there(self, number: int) -> tuple[int, ...] | None:
        """Return the shape of the same tensor with another batch."""
        shapes = [] if self.other is None else self.other.shapes
        return shapes[number] if number < len(shapes) else None

    def _compare(
        self, shape: tuple[int, ...], there: tuple[int, ...] | None, number: int | None = None
    ) -> Axis:
        """Find the axis whose length is another one with another batch."""
        if self.size == 0:
            return None
        lost = self.forks is not None and (number is None or number >= self.forks)
        if self.other is None or lost or there is None or len(there) != len(shape):
            return LOST
        more = self.other.size
        axes = [
            axis for axis, pair in enumerate(zip(shape, there, strict=True)) if pair[0] != pair[1]
        ]
        if not axes:
            return None
        axis = axes[0]
        fits = shape[axis] % self.size == 0 and shape[axis] * more == there[axis] * self.size
        return axis if len(axes) == 1 and fits else LOST

    def _describe(self, x: Any, loose: bool, index: bool, given: list[Tensor]) -> Any:
        """Return what is the same of an argument whenever the run is the same.

        Numbers in arithmetic may change, and which entry an index takes.
        """
        if isinstance(x, Tensor):
            given.append(x)
            number = self.number(x)
            if number is not None:
                return number + HALF
            self.strangers.setdefault(x, len(self.strangers))
            return stranger(x)
        kind = type(x)
        if kind is int and index:
            self.loosened = True
            return ANY
        if kind is float or kind is complex or (loose and (kind is int or kind in _PLAIN)):
            if kind is float and abs(x) >= INFINITE:
                return x  # a mask, under which all else is lost
            self.loosened = True
            return kind
        if kind is int or kind in _PLAIN:
            return x
        if isinstance(x, (list, tuple)):
            index = index and not isinstance(x, list)  # a list takes several, in its order
            return tuple([self._describe(part, loose, index, given) for part in x])
        if isinstance(x, dict):
            pairs = x.items()
            return tuple([(key, self._describe(part, loose, index, given)) for key, part in pairs])
        if kind is slice:
            ends = (x.start, x.stop, x.step)
            return (kind, *(self._describe(part, False, False, given) for part in ends))
        if isinstance(x, Number):  # of numpy, or of an enumeration
            return self._describe(python_number(x), loose, index, given)
        if isinstance(x, torch.Generator) and x not in self.generators:
            self.generators[x] = x.get_state()
        return _value(x)


def python_number(x: Any) -> Any:
    """Return a number of another kind, such as one of numpy, as one of Python."""
    return int(x) if isinstance(x, Integral) else float(x) if isinstance(x, Real) else complex(x)


class _AnyInteger:
    """Stands for any integer."""

    def __eq__(self, other: object) -> bool:
        return self is other or type(other) is int

    def __hash__(self) -> int:
        return 0


ANY = _AnyInteger()


def _is_arithmetic(args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether some argument has numbers that are no integers, which may be an index."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return any([x.is_floating_point() or x.is_complex() for x in given])


def _value(x: Any) -> Any:
    """Return what tells an argument of a rare kind from others, such as an array of numpy."""
    if isinstance(x, str):
        return str(x)
    if isinstance(x, type):  # a custom function
        return x
    if isinstance(x, FunctionType):  # a hook
        return x.__code__
    if not hasattr(x, "tobytes"):
        return type(x)
    array: Any = x
    return str(array.dtype), array.shape, array.tobytes()


class Stranger(NamedTuple):
    """What is listed of a tensor that no operation made."""

    traced: str | None
    shape: tuple[int, ...]
    layout: tuple[Any, ...]  # how it lies in memory tells which axis `vmap` took away


def stranger(x: Tensor) -> Stranger:
    """Return what is listed of a tensor that no operation made."""
    strides = x.stride() if x.layout == torch.strided else ()
    traced = "traced" if x.requires_grad else None  # as parameters are
    return Stranger(traced, tuple(x.shape), (x.dtype, x.layout, *strides))


INFINITE = 1e8  # a mask: it is often -1e9, or the least number of a dtype
HALF = 0.5  # tells the numbers of tensors from those that are arguments
_PLAIN = frozenset({bool, str, type(None), torch.dtype})
