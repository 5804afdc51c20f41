"""What an earlier run found out about an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from torchjd_func.differentiate._layerwise._functions import is_getter

Axis = int | None
LOST = -1  # the axis of a tensor whose examples do not lie along one


class Layout(NamedTuple):
    """How the objective treats examples."""

    kind: str  # "shared": no examples; "batched": along axes; "vmapped": under vmap, none visible
    size: int  # how many examples there are


class Step(NamedTuple):
    """What becomes of one operation on parameters."""

    func: Callable[..., Any]
    use: bool = False  # its derivative has a known form: its output is perturbed
    derives: bool = False  # its output is again a function of parameters alone
    axis: Axis = None  # where the examples of the output lie
    axes: tuple[Axis, ...] = ()  # where those of the arrays lie; None for what all share
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    leaves: tuple[int, ...] = ()  # that it is applied to
    hidden: tuple[int, ...] = ()  # leaves that come by getters such as `.T`, hidden from graphs
    visible: bool = True  # some source comes without


class Plan(NamedTuple):
    """What becomes of each operation on parameters, and of each parameter."""

    layout: Layout
    steps: tuple[Step, ...]
    opaque: tuple[int, ...]  # leaves whose rows autograd computes
    reasons: dict[int, str]  # why leaves are opaque, such as an operation without a known form
    operations: tuple[Any, ...]  # all operations of the run that was planned, to know it again
    proven: bool = False


def without(plan: Plan, leaves: set[int], reasons: dict[int, str]) -> Plan:
    """Return a plan where autograd computes the rows of more leaves."""
    opaque = {*plan.opaque, *leaves}
    steps = [s._replace(use=s.use and not opaque.issuperset(s.leaves)) for s in plan.steps]
    return plan._replace(
        steps=tuple(steps), opaque=tuple(sorted(opaque)), reasons=plan.reasons | reasons
    )


def for_graphs(plan: Plan) -> Plan:
    """Return the plan of a run whose getters, such as `.T`, a compiler hides."""
    hidden = {leaf for step in plan.steps for leaf in step.hidden}
    hidden |= {leaf for step in plan.steps if is_getter(step.func) for leaf in step.leaves}
    seen = [step for step in plan.steps if step.visible and not is_getter(step.func)]
    steps = [step._replace(use=False, derives=False) if step.hidden else step for step in seen]
    return without(plan._replace(steps=tuple(steps)), hidden, {})
