"""Whether operations that are handed integers of the data keep examples apart, whatever these are.

An index may permute the examples of one batch and not those of another, and a mask take as many
entries of each example or not: no proof on one batch shows that. So each such operation is tried
with other integers, and with the examples of all its data moved on by one. Nor does a proof show
what a threshold or a schedule keeps out of the losses for now: so it is followed which tensors
depend on parameters through all examples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._draws import draws
from torchjd_func.differentiate._layerwise._functions import name_of
from torchjd_func.differentiate._layerwise._gates import REFUSALS, holds_back
from torchjd_func.differentiate._layerwise._noise import near
from torchjd_func.differentiate._layerwise._operations import Operation, Operations
from torchjd_func.differentiate._layerwise._plan import Doubts
from torchjd_func.differentiate._layerwise._sources import substitute, tensors_in


class Order:
    """Watches the first run of an objective.

    Attributes:
        data: The numbers of the tensors that depend on arguments of the objective, on numbers in
            its code that may change, or on draws; `None` stands for tensors that no operation was
            seen to make, such as those of custom functions.
        broken: The first operation under which the order of examples depends on integers.
        pooled: The numbers of the tensors that depend on parameters through all examples at once,
            with the operation that put these together.
        mixed: The operation through which losses do, if any.
        bounds: The operations that hold parts of what is made of parameters back, as thresholds
            do, and which constants do not bind to that.
        flags: The numbers of flags for all examples that data decide, where they meet these.
        choices: Those of other integers that are such.
        counts: Those on integers alone that lie along examples, such as numbers of groups.
        answers: Those that make integers of other numbers, such as which is the largest.
    """

    def __init__(self, operations: Operations, inputs: Sequence[Tensor]) -> None:
        self.operations = operations
        self.data: set[int | None] = {None, *map(operations.number, inputs)}
        self.broken = ""
        self.pooled: dict[int | None, str] = {}
        self.mixed = ""
        self.bounds: set[int] = set()
        self.flags: set[int] = set()
        self.choices: set[int] = set()
        self.counts: set[int] = set()
        self.answers: set[int] = set()
        self.draws = draws(inputs)
        self.own = False  # whether the operation has a generator of its own
        self.passed: list[str] = []  # what put together what it is applied to

    def doubts(self) -> Doubts:
        """Return what the run did not show."""
        return Doubts(
            data=frozenset(self.data),
            bounds=frozenset(self.bounds),
            flags=frozenset(self.flags),
            choices=frozenset(self.choices),
            counts=frozenset(self.counts),
            answers=frozenset(self.answers),
        )

    def copies(self, operation: Operation) -> tuple[Any, Any] | None:
        """Return arguments to try an operation with, and where examples lie; `None` mostly."""
        _, args, kwargs, given = operation
        self.own = any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values()))
        numbers = [self.operations.number(x) for x in given if x.requires_grad]
        self.passed = [self.pooled[number] for number in numbers if number in self.pooled]
        axes = {}
        for x in given:
            axis = self.operations.axis(x) if self.operations.number(x) in self.data else None
            if isinstance(axis, int):
                axes[x] = axis
        if self.broken or len(axes) < 2 or not any(map(is_integer, axes)):
            return None
        return _copied(args, kwargs, axes)

    def compare(self, operation: Operation, out: Any) -> None:
        """Find out whether an operation on what is made of parameters compares examples.

        Where a schedule or a threshold keeps that out of the losses, or examples are sorted, no
        proof on one batch shows it.
        """
        func, args, kwargs, given = operation
        number, axis, results = self.operations.number, self.operations.axis, tensors_in(out)
        traced = [x for x in given if x.requires_grad]
        if self.passed:
            made = [x for x in results or given[:1] if x.requires_grad]
            self.pooled |= {number(x): self.passed[0] for x in made}
            return
        if not results or not any(isinstance(axis(x), int) for x in traced):
            return
        axes = {x: place for x in given if isinstance(place := axis(x), int)}
        made = [x for x in results if x.requires_grad and number(x) is not None]
        alike = [x for x in made if axis(x) is None and x.numel()]
        if alike and self._puts_together(func, *_copied(args, kwargs, axes)):
            self.pooled |= {number(x): name_of(func) for x in alike}
        elif any(is_integer(x) and isinstance(axis(x), int) for x in results):  # such as sort
            self.hold(operation, _copied(args, kwargs, axes), out)

    def _puts_together(
        self, func: Callable[..., Any], arguments: Any, where: dict[Tensor, int]
    ) -> bool:
        """Say whether moving the examples of all arguments changes nothing: it is no choice."""
        values, size = {x: near(x) for x in where}, self.operations.size
        try:
            moved = {x: moved_on(values[x], axis, size) for x, axis in where.items()}
            before, after = (_results(func, arguments, given) for given in (values, moved))
        except REFUSALS:
            return False
        return all(map(_same, before, after))

    def close(self, outputs: Sequence[Tensor]) -> None:
        """Note whether losses depend on all examples at once."""
        names = [self.pooled.get(self.operations.number(x), "") for x in outputs]
        self.mixed = next(filter(None, names), "")

    def hold(
        self,
        operation: Operation,
        copies: tuple[Any, Any] | None,
        out: Any,
        before: Operation | None = None,
    ) -> None:
        """Hold what an operation returned, or wrote to, against what it does with other data.

        Args:
            operation: It, and what it was applied to.
            copies: To try it with.
            out: What it returned.
            before: The same, with what it wrote to as it was.
        """
        func, _, _, given = operation
        results, place = tensors_in(out) or list(given[:1]), len(self.operations.names) - 1
        known, drawn = any(self.operations.number(x) in self.data for x in given), self._drawn()
        if drawn or known or self.operations.loosened:
            self.data.update(map(self.operations.number, results))
        integers = [x for x in given if is_integer(x)]
        if any(x.requires_grad for x in given):
            self._meet(integers)
        whole = bool(given) and len(integers) == len(given)
        if whole and any(self.operations.axis(x) is not None for x in results):
            self.counts.add(place)
        if known and any(map(is_integer, results)) and any(x.is_floating_point() for x in given):
            self.answers.add(place)
        if not self._is_bound(given) and holds_back(before or operation, out):
            self.bounds.add(place)
        if drawn:  # the same again, to see that
            self.draws = self.draws.again()
        if copies is None:
            return
        axes = [self.operations.axis(x) for x in results]
        shapes = [x.shape for x in results]
        if not self._keeps(func, *copies, axes, shapes):
            self.broken = name_of(func)

    def _meet(self, integers: Sequence[Tensor]) -> None:
        """Note which integers for all examples meet what is made of parameters."""
        for x in integers:
            number = self.operations.number(x)
            if number is not None and number in self.data and self.operations.axis(x) is None:
                (self.flags if x.dtype == torch.bool else self.choices).add(number)

    def _is_bound(self, given: Sequence[Tensor]) -> bool:
        """Say whether constants, which stay what they are, are among the arguments."""
        return any(self.operations.number(x) not in self.data for x in given if not x.requires_grad)

    def _drawn(self) -> bool:
        """Say whether an operation drew random numbers."""
        before, self.draws = self.draws, self.draws.again()
        return self.own or before.differ(self.draws)

    def _keeps(
        self,
        func: Callable[..., Any],
        arguments: Any,
        where: dict[Tensor, int],
        axes: Sequence[Any],
        shapes: Sequence[Any],
    ) -> bool:
        """Say whether moving the examples of all data moves those of the results."""
        size = self.operations.size
        for bound in (False, True, None):
            try:
                values = {x: _value(x, axis, size, bound) for x, axis in where.items()}
                moved = {x: moved_on(values[x], axis, size) for x, axis in where.items()}
                before, after = (_results(func, arguments, given) for given in (values, moved))
            except REFUSALS:
                continue  # integers that are out of bounds
            if [x.shape for x in before] != list(shapes):
                return False  # how many entries an example has depends on them
            return all(
                _same(moved_on(a, axis, size), b)
                for a, b, axis in zip(before, after, axes, strict=True)
                if isinstance(axis, int)
            )
        return False


def _copied(args: Any, kwargs: Any, axes: dict[Tensor, int]) -> tuple[Any, dict[Tensor, int]]:
    """Return copies of arguments, and where examples lie in these."""
    where: dict[Tensor, int] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        # On the CPU an index that is out of bounds is an error, and no more.
        if x.is_meta:
            inner = torch.zeros(x.shape, dtype=x.dtype)
        else:
            inner = x.detach().to("cpu", copy=True)
        if x in axes:
            where[inner] = axes[x]
        return inner

    return substitute((args, kwargs), copy), where


def is_integer(x: Tensor) -> bool:
    """Say whether a tensor may be an index or a mask."""
    return not (x.is_floating_point() or x.is_complex())


def _value(x: Tensor, axis: int, size: int, bound: bool | None) -> Tensor:
    """Return noise; of integers the number of each entry's example, up to the largest of `x`.

    Args:
        x: Data of one operation.
        axis: Where its examples lie.
        size: How many there are.
        bound: Whether the largest bounds the numbers; `None` for the integers that came.

    Returns:
        The data to try.
    """
    if not is_integer(x) or bound is None:
        return near(x)
    shape = [1] * x.ndim
    shape[axis] = -1
    numbers = torch.arange(x.shape[axis]).div(x.shape[axis] // size, rounding_mode="floor")
    if x.dtype == torch.bool:
        return (numbers % 2 == 0).reshape(shape).expand_as(x).clone()
    limit = (
        int(torch.func.debug_unwrap(x, recurse=True).amax()) + 1 if bound and x.numel() else size
    )
    return (numbers % max(limit, 1)).to(x.dtype).reshape(shape).expand_as(x).clone()


def moved_on(x: Tensor, axis: int, size: int) -> Tensor:
    """Move all examples on by one."""
    return x.roll(x.shape[axis] // size, axis)


def _results(
    func: Callable[..., Any], arguments: Any, values: dict[Tensor, Tensor]
) -> list[Tensor]:
    """Run an operation on copies, and return what it returned, or wrote to."""
    replaced: list[Tensor] = []

    def take(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        replaced.append(values[x].clone() if x in values else x.clone())
        return replaced[-1]

    args, kwargs = substitute(arguments, take)
    return tensors_in(func(*args, **kwargs)) or replaced[:1]


def _same(a: Tensor, b: Tensor) -> bool:
    """Say whether results agree, but for rounding; not-a-numbers are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    wide = [
        x if is_integer(x) else x.to(torch.complex128 if x.is_complex() else torch.float64)
        for x in (a, b)
    ]
    a, b = (torch.func.debug_unwrap(x, recurse=True) for x in wide)
    return bool(torch.isclose(a, b, rtol=1e-4, atol=1e-7, equal_nan=True).all())
