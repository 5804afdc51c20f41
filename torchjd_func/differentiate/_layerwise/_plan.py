"""What an earlier run found out about an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

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
    shape: torch.Size = torch.Size()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class Plan(NamedTuple):
    """What becomes of each operation on parameters, and of each parameter."""

    layout: Layout
    steps: tuple[Step, ...]
    opaque: tuple[int, ...]  # leaves whose rows autograd computes
    reasons: dict[int, str]  # the operation without a known form, of opaque leaves
    operations: tuple[Any, ...]  # all operations of the run that was planned, to know it again
    proven: bool = False


def without(plan: Plan, leaves: set[int], reasons: dict[int, str]) -> Plan:
    """Return a plan where autograd computes the rows of more leaves."""
    opaque = tuple(sorted({*plan.opaque, *leaves}))
    return plan._replace(opaque=opaque, reasons=reasons | plan.reasons)
