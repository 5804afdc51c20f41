"""Hold the operations of a graph against those of a plan.

A compiler hides some operations from those who watch. So a run is held against the operations of
the plan, one by one: the same, applied to the same, with the same shapes. Those that use no
parameters may be missing; what they return is then told by where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._functions import READERS, name_of
from torchjd_func.differentiate._layerwise._local import IN_PLACE
from torchjd_func.differentiate._layerwise._operations import ANY, HALF, Operations, Stranger
from torchjd_func.differentiate._layerwise._plan import Plan
from torchjd_func.differentiate._layerwise._sources import tensors_in


class Entry(NamedTuple):
    """An operation of a plan, as `_operations` lists it."""

    head: tuple[str, bool, int]  # name, whether autograd is on, how many tensors it is applied to
    values: tuple[Any, ...]  # the arguments, in order; `...` for any number
    named: tuple[tuple[str, Any], ...]  # those of them that came by name
    shapes: list[tuple[int, ...]]  # of what it returns
    aliased: list[int | None]  # which argument an output is


def entries(operations: Sequence[Any]) -> tuple[Entry, ...]:
    """Return the operations of a run; the last stands for what is returned."""
    found: list[Entry] = []
    alias = None
    for part in operations[:-1]:
        if isinstance(part, int):
            alias = part
        elif part and isinstance(part[0], str):
            values, named = _constants(part[3:])
            found.append(Entry(part[:3], (*values, *dict(named).values()), named, [], []))
        else:
            found[-1].shapes.append(tuple(part))
            found[-1].aliased.append(alias)
            alias = None
    return (*found, Entry(("", True, 0), _constants(operations[-1]), (), [], []))


def _constants(part: Any) -> Any:
    """Return what is listed with `...` for types, which stand for any value."""
    if isinstance(part, Stranger):
        return part[:2]
    if isinstance(part, tuple):
        return tuple(_constants(inner) for inner in part)
    return ... if part is ANY or isinstance(part, (type, CodeType)) else part


class Followed(Operations):
    """Holds operations against those of a plan; tensors have the numbers that they had there.

    What changes is held in lists and dicts: after a hook or a function of higher order is traced,
    attributes that are set are forgotten (torch 2.13).
    """

    def __init__(self, inputs: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(inputs)
        self.entries: tuple[Entry, ...] = plan.entries
        done = [step for step in plan.steps if step.use or any(step.derives)]
        self.planned = {step.place: step for step in done}  # those that are not done so far
        self.places = [-1]  # among the entries, of what was done
        self.begun: list[Entry] = []
        self.hidden: set[float] = set()  # the numbers of what hidden operations returned
        self.changed: list[str] = []  # the operations that are other ones

    def begin(self, func: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
        """Find an operation in the plan."""
        parts, name = (*args, *kwargs.values()), name_of(func)
        given = tensors_in(parts)
        if name in READERS.names or self.changed:
            return given
        head = (name, torch.is_grad_enabled(), len(given))
        while not self.fits(head, args, kwargs):
            if not self.hide():
                self.changed.append(_instead(name, self.upcoming().head[0]))
                return given
        self.begun.append(self.upcoming())
        self.places.append(self.places[-1] + 1)
        return given

    def end(self, out: Any, given: Sequence[Tensor]) -> None:
        """Number the outputs of an operation."""
        if self.changed or not self.begun:
            return
        entry = self.begun.pop()
        parts = [out] if isinstance(out, Tensor) else tensors_in(out)
        if len(parts) != len(entry.shapes):
            self.changed.append(entry.head[0])
        for x, shape, alias in zip(parts, entry.shapes, entry.aliased, strict=False):
            if tuple(x.shape) != (*shape,):
                self.changed.append(entry.head[0])
            self.known[x] = len(self.shapes)
            if alias is not None:
                self.known[given[alias]] = len(self.shapes)
            self.shapes.append(shape)

    def upcoming(self) -> Entry:
        """Return the next operation of the plan."""
        return self.entries[self.places[-1] + 1]

    def fits(self, head: tuple[str, bool, int], args: Sequence[Any], kwargs: Any) -> bool:
        """Say whether an operation is the next one of the plan."""
        entry = self.upcoming()
        if not all([a == b for a, b in zip(entry.head, head, strict=True)]):
            return False
        expected = _expected(entry, args, kwargs)
        return expected is not None and self._agree((*args, *kwargs.values()), expected)

    def hide(self) -> bool:
        """Pass by the next operation, as a compiler may hide it, or do without; not by uses."""
        place = self.places[-1] + 1
        if place in self.planned or place == len(self.entries) - 1:
            return False
        self.places.append(place)
        for shape in self.entries[place].shapes:
            self.hidden.add(len(self.shapes) + HALF)
            self.shapes.append(shape)
        return True

    def copies(self) -> bool:
        """Say whether the plan copies what the next operation in place gives."""
        names = [entry.head[0] for entry in self.entries[self.places[-1] + 1 :]]
        found = [name for name in names if name == "clone" or name in IN_PLACE]
        return found[:1] == ["clone"]

    def close(self, outputs: Sequence[Tensor]) -> None:
        """Hold what the run returns against the plan."""
        if self.changed:
            return
        while self.hide():
            pass
        values = self.upcoming().values
        alike = not self.planned and len(outputs) == len(values)
        if not (alike and self._agree(outputs, values)):
            self.changed.append("the losses")

    def _agree(self, parts: Sequence[Any], expected: Sequence[Any]) -> bool:
        """Say whether arguments are those of the plan; in few calls, which a compiler traces."""
        same = True
        for x, value in zip(parts, expected, strict=True):
            if isinstance(x, Tensor):
                number, shape = self.known.get(x), tuple(x.shape)
                if number is not None:
                    same = same and value == number + HALF
                elif value in self.hidden:
                    same = same and shape == (*self.shapes[int(value)],)
                    self.known[x] = int(value)
                else:
                    same = same and _is_stranger(value) and (*value[1],) == shape
            elif isinstance(x, (list, tuple, dict, slice)):  # one by one: see `plan_of`
                inner = _listed(x)
                alike = isinstance(value, tuple) and len(inner) == len(value)
                same = same and alike and self._agree(inner, value)
            else:
                # Of arrays of numpy a graph shows no values, which the plan has as a tuple
                same = same and (value is ... or (not isinstance(value, tuple) and x == value))
        return same


def _is_stranger(value: Any) -> bool:
    """Say whether a plan has a tensor there that no operation made."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], tuple)


def _instead(name: str, planned: str) -> str:
    """Return what a warning says of an operation that is not the planned one."""
    if planned == "__get__":
        return HIDES
    return name if planned in ("", name) else f"{name} (in place of {planned})"


def _expected(entry: Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """Return what a plan has in the places of arguments, by name or not; `None` for others."""
    if len(args) > len(entry.values):
        return None
    expected = list(entry.values[: len(args)])
    named = dict(entry.named) if kwargs else {}
    for name in kwargs:
        if name not in named:
            return None
        expected.append(named[name])
    return expected


def _listed(x: Any) -> Sequence[Any]:
    """Return the parts of an argument, as a plan lists them."""
    if isinstance(x, dict):
        return list(x.items())
    return (slice, x.start, x.stop, x.step) if isinstance(x, slice) else x


HIDES = "an operation on parameters that a compiler hides, such as `.T` (write `.t()`)"
