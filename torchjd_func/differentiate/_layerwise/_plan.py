"""What an earlier run found out about an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

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
    derives: bool = False  # its output is again a function of parameters alone
    axis: Axis = None  # where the examples of the output lie
    axes: tuple[Axis, ...] = ()  # where those of the arrays lie; None for what all share
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    leaves: tuple[int, ...] = ()  # that it is applied to
    place: int = 0  # among the operations of the run


@dataclass(frozen=True, eq=False)
class Listed:
    """Holds operations that never change: graphs are guarded by which object it is, not by each."""

    entries: tuple[Any, ...] = ()


class Plan(NamedTuple):
    """What becomes of each operation on parameters, and of each parameter."""

    layout: Layout
    steps: tuple[Step, ...]
    opaque: tuple[int, ...]  # leaves whose rows autograd computes
    reasons: dict[int, str]  # why leaves are opaque, such as an operation without a known form
    operations: tuple[Any, ...]  # all operations of the run that was planned, to know it again
    proven: bool = False
    listed: Listed = Listed()  # the same, for graphs that replay the plan
    uncompilable: str = ""  # why no graph can replay it, if so


def without(plan: Plan, leaves: set[int], reasons: dict[int, str]) -> Plan:
    """Return a plan where autograd computes the rows of more leaves."""
    opaque = {*plan.opaque, *leaves}
    steps = [s._replace(use=s.use and not opaque.issuperset(s.leaves)) for s in plan.steps]
    return plan._replace(
        steps=tuple(steps), opaque=tuple(sorted(opaque)), reasons=plan.reasons | reasons
    )
