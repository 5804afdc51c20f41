"""Plan what becomes of the operations of an objective, and again when it changes its ways."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from torchjd_func import _check
from torchjd_func.differentiate._layerwise import _proof
from torchjd_func.differentiate._layerwise._decide import Decider
from torchjd_func.differentiate._layerwise._draws import Draws
from torchjd_func.differentiate._layerwise._draws import draws as draws_of
from torchjd_func.differentiate._layerwise._followed import entries
from torchjd_func.differentiate._layerwise._gates import REFUSALS
from torchjd_func.differentiate._layerwise._operations import Operations
from torchjd_func.differentiate._layerwise._order import is_integer
from torchjd_func.differentiate._layerwise._plan import (
    Doubts,
    Layout,
    Plan,
    differ_in_sizes,
    settled,
    without,
)
from torchjd_func.differentiate._layerwise._points import Point, points
from torchjd_func.differentiate._layerwise._record import Problem, Recorded, record

_UNSEEN = "examples not seen: fn takes no other batch"
_FUNCTIONS = (
    "it applies a custom torch.autograd.Function, into which no graph looks, and whose backward is "
    "lost in graphs where it is inside another transform, such as vmap (torch 2.13)"
)
MOST_PLANS = 8  # remembered for arguments of the same shapes


def run(problem: Problem, plans: dict[Any, list[Plan]]) -> Recorded:
    """Run an objective as planned, or plan first.

    Args:
        problem: The objective.
        plans: What is remembered of earlier runs, by shapes; changed.

    Returns:
        The recorded run.
    """
    if torch.compiler.is_compiling():
        return _in_graph(problem, plans)
    key = _key(problem)
    draws = draws_of(problem.leaves, problem.generators)
    known = plans.setdefault(key, [])
    if any(plan.on_host for plan in known):
        draws = draws.with_host()
    recorded = None
    for _ in range(2):
        plan = _matching(known, recorded)
        if plan is None:
            break
        recorded = record(problem, plan)
        if _fits(recorded):
            return recorded if plan.proven else _proven_late(problem, plan, draws, known, recorded)
        draws.restore()
    draws = draws if draws.host else draws.with_host()
    for _ in range(2):
        plan = make(problem, draws, _every(plans))
        draws.restore()
        recorded = record(problem, plan)
        if _fits(recorded):
            known.insert(0, settled(plan))
            del known[MOST_PLANS:]
            return recorded
    draws.restore()
    return record(problem, _by_autograd(problem))


def _proven_late(
    problem: Problem, plan: Plan, draws: Draws, known: list[Plan], recorded: Recorded
) -> Recorded:
    """Return a run by a plan that was not proven where it was made, as gradients were zero, say."""
    if not problem.check:
        return recorded
    late = _proven(problem, plan, draws)
    known[known.index(plan)] = settled(late)
    draws.restore()
    return record(problem, late)


def _in_graph(problem: Problem, plans: dict[Any, list[Plan]]) -> Recorded:
    """Run an objective that is compiled as an eager run was planned and proven, or by autograd."""
    planned = plans.get(_key(problem), ())
    reason = next((known.uncompilable for known in planned if known.uncompilable), "")
    from torchjd_func.differentiate._compiled import plan_of, warn_unplanned

    # Watching a function that no graph looks into is an error of the compiler.
    for known in () if reason else planned:
        if known.proven and known.settled:
            recorded = record(problem, plan_of(known.settled))
            if not recorded.mode.changed:
                return recorded
            reason = f"it does something else than was planned, from {recorded.mode.changed[0]} on"
    if problem.layout.kind != "shared":
        warn_unplanned(reason or "no run with arguments of these shapes was planned")
    return record(problem, _by_autograd(problem))


def make(problem: Problem, draws: Draws, known: Sequence[Plan]) -> Plan:
    """Watch the objective with two batches, decide, and prove the decisions."""
    other, several, batched = None, 0, problem.layout.kind == "batched"
    if batched:
        size, other, several = _observe(problem, draws)
        problem = problem._replace(layout=Layout("batched", size))
    draws.restore()
    seen = record(problem, other=other)
    mode = seen.mode
    assert isinstance(mode, Decider)
    if other is not None:
        _check.as_many_losses(seen.outputs.shape[0], problem.layout.size, several)
    order = mode.order
    plan = Plan(
        problem.layout,
        tuple(mode.steps),
        (),
        mode.reasons,
        tuple(mode.operations.steps),
        entries=entries(mode.operations.steps),
        uncompilable=_FUNCTIONS if "custom_function_call" in mode.operations.names else "",
        along=mode.operations.along() if batched else (),
        dtypes=frozenset(mode.dtypes),
        on_host=draws.host_drew(),
        doubts=Doubts() if order is None else order.doubts(),
    )
    besides = {
        "drawn": draws.differ(draws.again()),
        "integers": any(map(is_integer, mode.operations.strangers)),
    }
    if batched and seen.outputs.shape[0] % max(problem.layout.size, 1):
        return _by_autograd(problem)
    if order is not None and order.broken:
        warnings.warn(_check.unordered(order.broken), UserWarning, stacklevel=2)
        reason = f"the order of examples depends on data at {order.broken}"
        return _by_autograd(problem, reason)._replace(proven=True)
    if batched and other is None:
        plan = plan._replace(reasons=dict.fromkeys(range(mode.count), _UNSEEN))
    plan = without(plan, seen.connected | mode.denied, {})
    if _is_known(plan, known) or not problem.check or len(plan.opaque) == len(problem.leaves):
        return plan._replace(proven=True)
    return _proven(problem, plan, draws, "" if order is None else order.mixed, **besides)


def _is_known(plan: Plan, known: Sequence[Plan]) -> bool:
    """Say whether what proved other plans proves this one."""
    # One number of examples proves nothing of another: `roll(4, 0)` leaves four as they are
    alike = {other.layout.size for other in known if other.proven and differ_in_sizes(other, plan)}
    return plan.layout.size in alike or len(alike) > (plan.layout.kind == "batched")


def _proven(
    problem: Problem,
    plan: Plan,
    draws: Draws,
    mixed: str = "",
    *,
    drawn: bool = False,
    integers: bool = False,
) -> Plan:
    """Return a plan without what fails the proof, at the first points where there is one."""
    for group in points(problem, plan, drawn=drawn, integers=integers):
        tried = [_failing(point, plan, draws) for point in group]
        found = [failing for failing in tried if failing is not None]
        if found or mixed:
            failing = {leaf: name for part in found for leaf, name in part.items()}
            if mixed and not failing:
                failing = dict.fromkeys(set(range(len(problem.leaves))) - set(plan.opaque), mixed)
            return _warned(problem, plan, failing)._replace(proven=True)
    return plan


def _failing(point: Point, plan: Plan, draws: Draws) -> dict[int, str] | None:
    """Return what fails the proof at a point; `None` if nothing is known there."""
    (draws.others() if point.shifted else draws).restore()
    try:
        recorded = record(point.problem, plan, noisy=point.noisy, swap=point.swap)
    except Exception:
        if not point.noisy:
            raise
        # Such as of data that leave an interval, or that a table does not have
        return _failing(point.milder, plan, draws) if point.milder else None
    return _proof.failing(recorded) if _fits(recorded) else None


def _warned(problem: Problem, plan: Plan, failing: dict[int, str]) -> Plan:
    """Warn of what fails, and leave it to autograd."""
    if failing:
        names = [problem.names[leaf] if problem.names else str(leaf) for leaf in failing]
        warnings.warn(_check.unproven(names, list(failing.values())), UserWarning, stacklevel=2)
    reasons = {leaf: f"mixes examples at {name}" for leaf, name in failing.items()}
    return without(plan, set(failing), reasons)


def _observe(problem: Problem, draws: Draws) -> tuple[int, Operations | None, int]:
    """Run the objective with one example more, and list what it does.

    Returns:
        How many examples there are; the operations with one more, and losses of each then.
    """
    sizes = []
    for size, call, inputs in problem.larger():
        sizes.append(size)
        draws.restore()
        layout = Layout("batched", size + 1)
        larger = problem._replace(call=call, inputs=inputs, layout=layout)
        try:
            seen = record(larger, _by_autograd(larger))
        except REFUSALS:
            continue  # sizes that the objective checks, or constants of the batch's size
        if seen.outputs.shape[0] % (size + 1) == 0:
            return size, seen.mode.operations, seen.outputs.shape[0] // (size + 1)
    return (sizes or [0])[0], None, 0


def _fits(recorded: Recorded) -> bool:
    """Say whether a run was as planned, so that what was recorded is all there is."""
    mode, plan = recorded.mode, recorded.plan
    if len(plan.opaque) == mode.count:
        return True
    return (
        not mode.changed
        and len(mode.steps) == len(plan.steps)
        and recorded.connected <= set(plan.opaque)
        and tuple(mode.operations.steps) == plan.operations
    )


def _matching(known: Sequence[Plan], recorded: Recorded | None) -> Plan | None:
    """Return the latest plan, or another for the operations of a run that it did not fit."""
    if recorded is None:
        return known[0] if known else None
    operations, tried = tuple(recorded.mode.operations.steps), recorded.plan
    others = (plan for plan in known if plan is not tried)
    return next((plan for plan in others if plan.operations == operations), None)


def _by_autograd(problem: Problem, reason: str = _UNSEEN) -> Plan:
    """Return the plan to have all rows by autograd."""
    opaque = tuple(range(len(problem.leaves)))
    return Plan(problem.layout, (), opaque, dict.fromkeys(opaque, reason), ())


def plan(problem: Problem, plans: dict[Any, list[Plan]]) -> None:
    """Plan a run that a graph is to replay; random generators stay as they were."""
    draws = draws_of(problem.leaves, problem.generators).with_host()
    run(problem, plans)
    draws.restore()


def _every(plans: dict[Any, list[Plan]]) -> list[Plan]:
    """Return the plans for arguments of all shapes."""
    return [plan for known in plans.values() for plan in known]


def _key(problem: Problem) -> Any:
    """Return what a plan depends on, besides the code: shapes."""
    tensors = (*problem.leaves, *problem.inputs)
    return problem.layout.kind, tuple((tuple(x.shape), x.dtype, x.device) for x in tensors)
