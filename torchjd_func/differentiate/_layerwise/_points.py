"""Where a plan is tried before it is used: where nothing is right by coincidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._disturbed import Swap
from torchjd_func.differentiate._layerwise._noise import near, scattered
from torchjd_func.differentiate._layerwise._order import is_integer, moved_on
from torchjd_func.differentiate._layerwise._plan import LOST, Plan
from torchjd_func.differentiate._layerwise._record import Problem
from torchjd_func.differentiate._pullback import as_it_is

SMALLER = 0.2
Change = Callable[[Tensor], Tensor]


class Point(NamedTuple):
    """Where a plan is tried.

    Attributes:
        problem: The objective there.
        noisy: What gets noise besides, as of `Disturbed`.
        swap: What takes the place of data and constants.
        shifted: Whether other random numbers are drawn.
        milder: Where to try instead, if the objective cannot take such data.
    """

    problem: Problem
    noisy: int = 0
    swap: Swap | None = None
    shifted: bool = False
    milder: Point | None = None


def points(problem: Problem, plan: Plan, *, drawn: bool, integers: bool) -> Iterator[list[Point]]:
    """Yield the points of a proof, and others for where nothing is known at the first.

    These have noise in parameters, data, constants and what uses return, since of a batch of zeros,
    or of equal examples, nothing tells which row is whose. Then smaller parameters, since nothing
    tells it where activations saturate; other numbers in the code, since nothing tells it where a
    coefficient is zero; thresholds that let something through, and other answers to what is asked
    of all examples, since nothing tells it where a gate is closed; other draws, examples in another
    order and other integers, since nothing tells it where examples are sorted.

    Args:
        problem: The objective.
        plan: What is tried.
        drawn: Whether random numbers were drawn.
        integers: Whether integers were used that are not among the arguments.

    Yields:
        Points, of which at least one must show something, or the next are asked for.
    """
    moved = problem._replace(leaves=[near(leaf) for leaf in problem.leaves])
    smaller = problem._replace(leaves=[SMALLER * leaf for leaf in moved.leaves])
    first = [*_at(moved, near), *_at(smaller, near), *_at(moved, near, 2)]
    if first:
        first += _at(moved, near, 3) if plan.doubts.bounds else []
        first += _at(moved, near, 4) if plan.doubts.flags else []
        if _is_safe(problem.inputs):
            first += _at(moved, near, 5) if plan.doubts.choices else []
            first += _at(moved, near, 6) if plan.doubts.answers else []
        for change, milder in _changes(problem, plan, integers):
            first += _at(moved, change, milder=milder)
        # Last as it is: what noise is added to is a new tensor, and no view that is written to.
        yield [*first, *(_at(moved, near, shifted=True) if drawn else []), Point(moved)]
    yield [Point(moved)]
    yield [Point(problem)]


def _at(
    problem: Problem,
    change: Change,
    noisy: int = 1,
    *,
    shifted: bool = False,
    milder: Change | None = as_it_is,
) -> list[Point]:
    """Return the point where data and constants are changed, if that makes a difference."""
    instead = None if milder is None else _at(problem, milder, noisy, shifted=shifted, milder=None)
    return [
        Point(
            problem._replace(call=call, inputs=inputs),
            noisy,
            Swap(change, zip(problem.inputs, inputs, strict=True)),
            shifted,
            instead[0] if instead else None,
        )
        for call, inputs in problem.noisy(change)
    ]


def _changes(problem: Problem, plan: Plan, integers: bool) -> Iterator[tuple[Change, Change]]:
    """Yield what puts examples in another order and what makes other integers, then no noise."""
    size, inputs = plan.layout.size, set(problem.inputs)
    pairs = zip(problem.inputs, plan.along, strict=False)
    axes = {x: axis for x, axis in pairs if axis not in (None, LOST) and x.layout == torch.strided}

    def roll(x: Tensor) -> Tensor:
        return moved_on(x, axes[x], size) if x in axes else x

    def renumber(x: Tensor) -> Tensor:
        return others(x) if is_integer(x) and (x in axes or x not in inputs) else x

    if not axes or size < 2:
        return
    yield _noisy(roll), roll
    if _is_safe(axes) and (integers or any(map(is_integer, axes))):
        yield _noisy(renumber), renumber


def _is_safe(data: Iterable[Tensor]) -> bool:
    """Say whether an index that is out of bounds is an error and no more, as on the CPU."""
    return all(x.device.type == "cpu" for x in data)


def _noisy(change: Change) -> Change:
    """Return a change that adds noise, too."""
    return lambda x: near(change(x))


def others(x: Tensor) -> Tensor:
    """Return other integers, up to the largest, or flags."""
    places = scattered(x.to(torch.float64))
    if x.dtype == torch.bool:
        return places > 0
    limit = max(int(torch.func.debug_unwrap(x, recurse=True).amax()) + 1, 1)
    return ((places + 1) / 2 * limit).floor().clamp(max=limit - 1).to(x.dtype)
