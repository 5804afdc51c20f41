"""Replay a plan in a graph, if what is compiled does what the plan was made for.

A compiler hides some operations from those who watch. So a run is held against the operations of
the plan, one by one: the same, applied to the same, with the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._functions import READERS, name_of
from torchjd_func.differentiate._layerwise._operations import HALF, Operations, is_operation
from torchjd_func.differentiate._layerwise._plan import Plan, Step
from torchjd_func.differentiate._layerwise._sources import tensors_in
from torchjd_func.differentiate._layerwise._trace import Trace


class Followed(Operations):
    """Holds operations against those of a plan; tensors have the numbers that they had there."""

    def __init__(self, inputs: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(inputs)
        self.count = len(inputs)
        self.entries = plan.operations
        self.idle = plan.idle
        self.planned = {step.place: step for step in plan.steps}
        self.at = 0  # among the entries
        self.place = -1  # among operations
        self.reads = False  # whether the operation here is of no interest
        self.hidden: set[float] = set()  # the numbers of what hidden operations returned
        self.changed = ""  # the first operation that is another one

    def begin(self, func: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
        """Find an operation in the plan."""
        given, name = tensors_in((args, kwargs)), name_of(func)
        self.reads = name in READERS.names
        if not self.reads and not self.changed:
            self.skip(name)
            head = (name, torch.is_grad_enabled(), len(given))
            if (
                self._upcoming() != name
                or self.entries[self.at][:3] != head
                or not self._binds(args, kwargs, self.entries[self.at][3:])
            ):
                self.changed = name
            self.at += 1
            self.place += 1
        return given

    def end(self, out: Any, given: Sequence[Tensor]) -> None:
        """Number the outputs of an operation."""
        if self.reads or self.changed:
            return
        shapes, aliased = self._outputs()
        parts = tensors_in(out)
        if [tuple(x.shape) for x in parts] != shapes:
            self.changed = "an operation on other shapes"
        for x, alias in zip(parts, aliased, strict=False):
            self.known[x] = self.count
            if alias is not None:
                self.known[given[alias]] = self.count
            self.count += 1

    def skip(self, name: str) -> None:
        """Pass by operations that a compiler hides, as far as these are not known functions."""
        while self._upcoming() != name and (
            self._upcoming() in HIDDEN or self.place + 1 in self.idle
        ):
            self.at += 1
            self.place += 1
            step = self.planned.pop(self.place, None)
            if step is not None and (step.use or step.derives):
                self.changed = self._upcoming()
            for _ in self._outputs()[0]:
                self.hidden.add(self.count + HALF)
                self.count += 1

    def close(self, outputs: Sequence[Tensor]) -> None:
        """Hold the outputs of the run against those of the plan."""
        self.skip("")
        last = self.at == len(self.entries) - 1
        if not (last and self._agrees(list(outputs), self.entries[-1])):
            self.changed = self.changed or "the losses"

    def _upcoming(self) -> str:
        """Return the name of the operation of the plan that is next, if one is."""
        entry = self.entries[self.at] if self.at < len(self.entries) else ()
        return entry[0] if is_operation(entry) else ""

    def _outputs(self) -> tuple[list[Any], list[Any]]:
        """Return the shapes of what an operation returned, and which arguments these were."""
        shapes, aliased = [], []
        while self.at < len(self.entries) - 1 and not self._upcoming():
            alias = None
            if isinstance(self.entries[self.at], int):
                alias = self.entries[self.at]
                self.at += 1
            shapes.append(self.entries[self.at])
            aliased.append(alias)
            self.at += 1
        return shapes, aliased

    def _binds(self, args: Any, kwargs: Any, expected: Any) -> bool:
        """Say whether arguments are those of the plan, where all that has a name may have it."""
        named = dict(expected[-1]) if expected and _is_by_name(expected[-1]) else {}
        values = [*expected[: len(expected) - bool(named)], *named.values()]
        if len(args) > len(values) or not all(name in named for name in kwargs):
            return False
        pairs = [
            *zip(args, values, strict=False),
            *((x, named[name]) for name, x in kwargs.items()),
        ]
        return all([self._agrees(x, value) for x, value in pairs])

    def _agrees(self, x: Any, expected: Any) -> bool:
        """Say whether an argument is that of the plan."""
        if isinstance(x, Tensor):
            if expected in self.hidden and x not in self.known:
                self.known[x] = int(expected)
            return (self.known[x] + HALF if x in self.known else None) == expected
        if isinstance(x, dict):
            x = [[key, part] for key, part in x.items()]
        if isinstance(x, slice):
            x = [slice, x.start, x.stop, x.step]
        if isinstance(x, (list, tuple)):
            if not isinstance(expected, tuple) or len(x) != len(expected):
                return False
            return all([self._agrees(*pair) for pair in zip(x, expected, strict=True)])
        return isinstance(expected, type) or x == expected


class Replay(Trace):
    """Watches a run that is compiled, and does as planned."""

    operations: Followed

    def is_on_parameters(self, given: Sequence[Tensor]) -> bool:
        """Say whether parameters are used, where the plan says so."""
        return self.operations.place in self.operations.planned and not self.operations.reads

    def next_step(self, func: Callable[..., Any], given: Sequence[Tensor]) -> Step | None:
        """Return what the plan makes of the operation here, if it is applied to the same leaves."""
        step = self.operations.planned[self.operations.place]
        leaves = {leaf for x in given if x in self.sources for leaf in self.sources[x].leaves}
        same = not self.operations.changed and sorted(leaves) == sorted(step.leaves)
        return step if same else None

    def traced(self, x: Tensor) -> bool:
        """Trust the plan on what autograd traces."""
        return True

    def alias(self, tree: Any) -> Any:
        """Return the arguments; leaves without rows by autograd are constants."""
        return tree

    def finish(self, outputs: list[Tensor]) -> None:
        """Find out whether the run was the one that was planned."""
        self.operations.close(outputs)
        missing = "" if len(self.steps) == len(self.operations.planned) else "an operation"
        self.changed = self.changed or self.operations.changed or missing


def _is_by_name(part: Any) -> bool:
    """Say whether a part of what is listed of an operation is its keyword arguments."""
    return isinstance(part, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in part
    )


# Whose outputs are told by where they are used, and which use no parameters (torch 2.13)
HIDDEN = READERS.names | {
    *("__get__", "pad", "_set_grad_enabled", "requires_grad_", "grad"),
    *("_make_dual", "_unpack_dual"),
}
