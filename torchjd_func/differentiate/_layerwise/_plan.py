"""What an earlier run found out about an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import register_constant

from torchjd_func.differentiate._layerwise._sources import instances_in

Axis = int | None
LOST = -1  # the axis of a tensor whose examples do not lie along one


class Layout(NamedTuple):
    """How the objective treats examples."""

    kind: str  # "shared": no examples; "batched": along axes; "vmapped": under vmap, none visible
    size: int  # how many examples there are

    def losses_of_one(self, m: int) -> int:
        """Return how many of `m` losses are those of one example."""
        whole = self.kind == "batched" and self.size > 0 and m % self.size == 0
        return m // self.size if whole else 1


class Step(NamedTuple):
    """What becomes of one operation on parameters."""

    func: Callable[..., Any]
    use: bool = False  # its derivative has a known form: its output is perturbed
    moves: str = ""  # what it only moves, see `_moves`
    derives: tuple[bool, ...] = ()  # which outputs are again functions of parameters alone
    axis: Axis = None  # where the examples of the output lie
    axes: tuple[Axis, ...] = ()  # where those of the arrays lie; None for what all share
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    leaves: tuple[int, ...] = ()  # that it is applied to
    made: tuple[bool, ...] = ()  # which tensors it is applied to are made of them alone
    place: int = 0  # among the operations of the run
    numbers: tuple[float, ...] = ()  # its arguments, which alone its form may be for
    copied: bool = False  # its output is a view, and written to: autograd forgets where it was


class Doubts(NamedTuple):
    """What one run does not show: tensors by their numbers, operations by their places."""

    data: frozenset[int | None] = frozenset()  # tensors whose values may change
    bounds: frozenset[int] = frozenset()  # operations that hold parts of an argument back
    flags: frozenset[int] = frozenset()  # flags for all examples
    choices: frozenset[int] = frozenset()  # and integers
    counts: frozenset[int] = frozenset()  # operations on integers alone, which lie along examples
    answers: frozenset[int] = frozenset()  # operations that make integers of other numbers


class Plan(NamedTuple):
    """What becomes of each operation on parameters, and of each parameter."""

    layout: Layout
    steps: tuple[Step, ...]
    opaque: tuple[int, ...]  # leaves whose rows autograd computes
    reasons: dict[int, str]  # why leaves are opaque, such as an operation without a known form
    operations: tuple[Any, ...]  # all operations of the run that was planned, to know it again
    proven: bool = False
    entries: tuple[Any, ...] = ()  # the same, as graphs are held against them
    uncompilable: str = ""  # why no graph can replay it, if so
    along: tuple[Axis, ...] = ()  # where the examples of the inputs lie
    dtypes: frozenset[torch.dtype] = frozenset()  # of all that derivatives go through
    on_host: bool = False  # whether the generator of Python or NumPy draws numbers
    doubts: Doubts = Doubts()
    settled: Settled | None = None  # the same plan, for graphs that replay it


class Settled:
    """Holds a plan that never changes: graphs are guarded by which object it is, not by each.

    Versions of torch before 2.13 pass only registered constants to what graphs cannot look into.
    """

    def __init__(self, plan: Plan) -> None:
        # Without functions: each comes with its arguments
        steps = [(None, *step[1:]) for step in plan.steps]
        self.parts = (tuple(plan.layout), tuple(steps), plan.opaque, plan.entries)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


register_constant(Settled)


def settled(plan: Plan) -> Plan:
    """Return a plan that graphs may replay as it is."""
    return plan._replace(settled=Settled(plan))


def without(plan: Plan, leaves: set[int], reasons: dict[int, str]) -> Plan:
    """Return a plan where autograd computes the rows of more leaves."""
    opaque = {*plan.opaque, *leaves}
    steps = [s._replace(use=s.use and not opaque.issuperset(s.leaves)) for s in plan.steps]
    return plan._replace(
        steps=tuple(steps), opaque=tuple(sorted(opaque)), reasons=plan.reasons | reasons
    )


def differ_in_sizes(first: Plan, second: Plan) -> bool:
    """Say whether what proves one plan proves another, for arguments of other shapes.

    Their operations have to be the same but for sizes, and for numbers that are sizes. Of a single
    example, or along an axis of length 1, nothing tells what is mixed.

    Returns:
        Whether it does.
    """
    pairs = _pairs(first, second)
    shapes = [both for a, b in pairs for both in zip(a.shapes, b.shapes, strict=True)]
    if not pairs or any(len(a) != len(b) for a, b in shapes):
        return False
    sizes = {size for a, b in shapes for size in zip(a, b, strict=True)}
    sizes.add((first.layout.size, second.layout.size))
    if any(a != b and min(a, b) < 2 for a, b in sizes):
        return False
    counted = [pairs[place] for place in first.doubts.counts]
    if any(a.shapes != b.shapes and _share(a.values, b.values) for a, b in counted):
        return False  # groups of as many, of more examples
    sizes |= {(math.prod(a), math.prod(b)) for a, b in shapes}
    return all(
        _agree(a.values, b.values, sizes) and _agree(a.named, b.named, sizes) for a, b in pairs
    )


def _pairs(first: Plan, second: Plan) -> list[tuple[Any, Any]]:
    """Return the operations of plans side by side; none if they are not the same."""
    plans = first, second
    decided = [
        (
            p.layout.kind,
            p.opaque,
            [step._replace(shape=()) for step in p.steps],
            instances_in((type, CodeType), p.operations),  # custom functions and hooks
        )
        for p in plans
    ]
    entries = [p.entries for p in plans]
    if decided[0] != decided[1] or len(entries[0]) != len(entries[1]):
        return []
    pairs = list(zip(*entries, strict=True))
    alike = all(
        a.head == b.head and a.aliased == b.aliased and len(a.shapes) == len(b.shapes)
        for a, b in pairs
    )
    return pairs if alike else []


def _share(a: Any, b: Any) -> bool:
    """Say whether arguments have an integer in common that may tell how many are in a group."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return any(_share(*both) for both in zip(a, b, strict=False))
    return type(a) is int and type(b) is int and a == b and a > 1


def _agree(a: Any, b: Any, sizes: set[tuple[int, int]]) -> bool:
    """Say whether arguments are the same, or sizes that belong together."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_agree(*both, sizes) for both in zip(a, b, strict=True))
    return a == b or (type(a) is type(b) is int and (a, b) in sizes)
