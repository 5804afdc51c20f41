"""Measures of what a rule sees and does, kept in its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from torchjd_func import _check, _names, _present, _tree
from torchjd_func._lift import statistic_like, weighted
from torchjd_func._present import Present
from torchjd_func._types import Aggregator, Observation, PyTree, Scalarizer, State, Weighting
from torchjd_func.combinators._grouped import EachState, GroupedState

Rule = TypeVar("Rule", Weighting, Aggregator, Scalarizer)
Measures = Mapping[str, Callable[[Observation], Tensor]]


class MonitoredState(NamedTuple):
    """The latest values of the measures, and the state of the rule that is watched."""

    measures: dict[str, Tensor]  # as the measures return them; zeros before the first call
    inner: State


def monitored(rule: Rule, measures: Measures) -> Rule:
    """Watch a rule: keep the latest values of measures of it in the state.

    The rule is not changed. Each measure is a pure function of a `jd.Observation`: see
    `jd.measures` for those at hand. Of a rule with weights they see the Gramian and the weights,
    never the rows, so that values do not depend on the route of `jd.grad`; of one that needs the
    rows, the Jacobian and the update as well, and no weights; of a Scalarizer the losses and its
    weights, the derivative of its loss by the losses.

    Wrap a rule inside `jd.grouped` to get a value for each group, stacked; wrap the grouped rule
    to get one for the whole update, for which the Jacobian is built. In `jd.every`, values are
    those of the last call that was due.

    Values stay on their device, and nothing waits for them until they are read. A compiled function
    that does not return the state does not compute them at all; one that does computes them at
    every call, on `(m, m)` matrices. A rule that looks at no gradient, such as `jd.mean()`, is
    given its Gramian here.

    Args:
        rule: A Weighting, an Aggregator or a Scalarizer.
        measures: `{name: measure}`. A measure has to return a tensor, of a shape that depends on
            `m` alone; one of shape `(m,)` or `(m, m)` has a value for each objective, or pair of
            them, which is NaN where an objective is absent.

    Returns:
        A rule of the type of `rule`, with the same results. Its state holds the values, which are 0
        before the first call: read them by `jd.read_measures`.

    Raises:
        TypeError: If `rule` is not a rule, or a measure not a function.
        ValueError: At `init`, if a measure needs what the rule does not have.

    Differs from other implementations:
        TorchJD's documentation monitors by forward hooks on aggregator modules.

    References:
        T. Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, on what to look at,
        https://arxiv.org/abs/2001.06782

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.upgrad(), {"lowest": jd.measures.min_cosine})
        >>> grads, state = rule(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        >>> jd.read_measures(state)["lowest"] > 0
        tensor(True)
    """
    _check.combinable("monitored", rule, (Weighting, Aggregator, Scalarizer))
    _check.functions("measures", measures)
    bound: dict[str, Any] = {"inner": rule, "measures": dict(measures)}
    name = _name(rule)
    if isinstance(rule, Scalarizer):
        observe = None if rule.observe is None else partial(_forward_observe, inner=rule)
        init, update = partial(_init_losses, **bound), partial(_update_losses, **bound)
        return Scalarizer(name, init, update, observe)
    if isinstance(rule, Aggregator):
        if rule.weighting is not None:
            return weighted(monitored(rule.weighting, measures))
        return Aggregator(name, partial(_init_rows, **bound), partial(_update_rows, **bound))
    needs = "gramian" if rule.needs in ("size", "norms") else rule.needs
    init, update = partial(_init, **bound), partial(_update, **bound)
    return Weighting(name, init, update, needs, widen=False, robust=rule.robust)


def read_measures(state: State, *, names: PyTree = None) -> dict[str, Any]:
    """Return the latest values of all measures in a state, however deep.

    Args:
        state: Of `jd.monitored`, or of a rule that contains it.
        names: The losses, or a sequence of their names: values come by the names of the
            objectives, such as `"a"`, or `"b.0"` where a leaf of the losses holds several.

    Returns:
        `{measure: value}`; inside `jd.grouped`, values are stacked over the groups, counted as
        there. With `names`, a value `(m,)` is `{objective: value}`, and one `(m, m)` is
        `{objective: {objective: value}}`, row by row. Of a state that is mapped over models,
        read them under `torch.func.vmap` as well.

    Raises:
        ValueError: If there are none, or two of one name that are not of different groups; or if
            two objectives have one name.

    Example:
        >>> import torch, torchjd_func as jd
        >>> inner = jd.monitored(jd.mgda(), {"weights": jd.measures.weights})
        >>> _, state = jd.grouped(inner, jd.by_tensor)({"a": torch.eye(2), "b": torch.eye(2)})
        >>> jd.read_measures(state)["weights"]
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
        >>> jd.read_measures(state, names=["speed", "safety"])["weights"]["safety"]
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    labels = None if names is None else _names.of_each(names)
    _check.distinct("names", labels or [])
    values = _read(state, labels)
    _check.measured(list(values))
    return values


def _read(state: State, labels: list[str] | None, stacked: int = 0) -> dict[str, Any]:
    """Return the measures in a state by name; `stacked` counts dimensions of groups."""
    if isinstance(state, MonitoredState):
        own = {key: _labelled(value, labels, stacked) for key, value in state.measures.items()}
        return _apart([own, _read(state.inner, labels, stacked)])
    if isinstance(state, EachState):
        return _tree.stack([_read(part, labels, stacked) for part in state.states])
    if isinstance(state, GroupedState):
        deeper = [stacked + (not isinstance(part, EachState)) for part in state.inner]
        parts = zip(state.inner, deeper, strict=True)
        return _joined([_read(part, labels, depth) for part, depth in parts])
    if isinstance(state, tuple | list | Mapping):
        parts = state.values() if isinstance(state, Mapping) else state
        return _apart([_read(part, labels, stacked) for part in parts])
    return {}


def _labelled(value: Tensor, labels: list[str] | None, stacked: int) -> PyTree:
    """Return a value with one number for each objective, or pair of them, by their names."""
    if labels is None:
        return value
    m, shape = len(labels), value.shape[stacked:]
    if shape == (m, m):
        value_of = dict(zip(labels, value.unbind(stacked), strict=True))
        return {label: _labelled(row, labels, stacked) for label, row in value_of.items()}
    return dict(zip(labels, value.unbind(-1), strict=True)) if shape == (m,) else value


def _apart(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all measures, after a check that no two have one name."""
    _check.distinct("measures", [name for part in parts for name in part])
    return {name: value for part in parts for name, value in part.items()}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all measures, those of one name along the groups."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _tree.cat([part[name] for part in parts if name in part]) for name in names}


def _name(inner: Weighting | Aggregator | Scalarizer) -> str:
    """Return the name of the combination."""
    return f"monitored({inner.name})"


def _init(
    statistic: Tensor, key: Tensor | None, *, inner: Weighting, measures: Measures
) -> MonitoredState:
    """Start from zeros, of the shapes that the measures give."""
    m = statistic.shape[0]
    ones = statistic.new_ones((m,), dtype=torch.float64)
    gramian = torch.eye(m, dtype=statistic.dtype, device=statistic.device)
    seen = Observation(gramian, ones / max(m, 1), ones, None, None)
    return MonitoredState(_zeros(measures, seen), inner.init_fn(statistic, key))


def _update(
    statistic: Tensor,
    state: MonitoredState,
    losses: Tensor | None,
    *,
    inner: Weighting,
    measures: Measures,
    present: Tensor | None = None,
) -> tuple[Tensor, MonitoredState]:
    """Weigh, and measure that."""
    _check.state_type(_name(inner), state, MonitoredState)
    wide = statistic.to(torch.float64) if inner.widen else statistic
    weights, inner_state = _present.update(inner, wide, state.inner, losses, present=present)
    weights = weights if present is None else torch.where(present, weights, 0)
    seen = Observation(statistic, weights, losses, None, None, present)
    return weights, _measured(_name(inner), measures, seen, state, inner_state)


def _init_rows(
    jac: PyTree, key: Tensor | None, *, inner: Aggregator, measures: Measures
) -> MonitoredState:
    """Start from zeros, of the shapes that the measures give."""
    statistic = statistic_like(jac)
    m = statistic.shape[0]
    gramian = torch.eye(m, dtype=statistic.dtype, device=statistic.device)
    losses = statistic.new_ones((m,))
    rows = _tree.map(lambda leaf: _tree.placeholder(leaf, leaf.shape), jac)
    grads = _tree.map(lambda leaf: _tree.placeholder(leaf, leaf.shape[1:]), jac)
    seen = Observation(gramian, None, losses, rows, grads)
    return MonitoredState(_zeros(measures, seen), inner.init(jac, key=key))


def _update_rows(
    jac: PyTree,
    state: MonitoredState,
    losses: Tensor | None,
    *,
    inner: Aggregator,
    measures: Measures,
    present: Tensor | None = None,
) -> tuple[PyTree, MonitoredState]:
    """Aggregate, and measure that."""
    _check.state_type(_name(inner), state, MonitoredState)
    grads, inner_state = _present.update(inner, jac, state.inner, losses, present=present)
    seen = Observation(_tree.gramian(jac), None, losses, jac, grads, present)
    return grads, _measured(_name(inner), measures, seen, state, inner_state)


def _init_losses(
    losses: Tensor, key: Tensor | None, *, inner: Scalarizer, measures: Measures
) -> MonitoredState:
    """Start from zeros, of the shapes that the measures give."""
    ones = torch.ones_like(losses)
    seen = Observation(None, ones / max(len(ones), 1), ones, None, None)
    return MonitoredState(_zeros(measures, seen), inner.init_fn(losses, key))


def _update_losses(
    losses: Tensor,
    state: MonitoredState,
    *,
    inner: Scalarizer,
    measures: Measures,
    present: Tensor | None = None,
) -> tuple[Tensor, MonitoredState]:
    """Scalarize, and measure that."""
    _check.state_type(_name(inner), state, MonitoredState)

    def scalarize(vector: Tensor) -> tuple[Tensor, State]:
        return _present.update(inner, vector, state.inner, present=present)

    loss, inner_state = scalarize(losses)
    weights = torch.func.grad(scalarize, has_aux=True)(losses)[0]
    seen = Observation(None, weights, losses, None, None, present)
    return loss, _measured(_name(inner), measures, seen, state, inner_state)


def _forward_observe(
    losses: PyTree, state: MonitoredState, *, inner: Scalarizer, present: Present = None
) -> MonitoredState:
    """Let the scalarizer observe; the values stay."""
    _check.state_type(_name(inner), state, MonitoredState)
    options = {} if present is None else {"present": present}
    assert inner.observe is not None
    return state._replace(inner=inner.observe(losses, state.inner, **options))


def _zeros(measures: Measures, like: Observation) -> dict[str, Tensor]:
    """Return zeros of the shapes and dtypes of the values."""
    values = {name: _check.measure_value(name, fn(like)) for name, fn in measures.items()}
    return {name: torch.zeros_like(value) for name, value in values.items()}


def _measured(
    name: str, measures: Measures, seen: Observation, state: MonitoredState, inner: State
) -> MonitoredState:
    """Return the state with new values, after a check that they replace those of a like state."""
    _check.names("state.measures", state.measures, measures)
    # Gramians of rows are in float64, whatever the state began with.
    values = {
        key: _visible(measure(seen).to(state.measures[key].dtype), seen.present)
        for key, measure in measures.items()
    }
    for key, value in values.items():
        _check.state(name, f"measures[{key!r}]", state.measures[key], value.shape)
    return MonitoredState(values, inner)


def _visible(value: Tensor, present: Tensor | None) -> Tensor:
    """Return a copy of a value, NaN where it belongs to an absent objective."""
    if present is None or not value.is_floating_point():
        # A copy: a state in which one tensor stands in two places would be compiled twice.
        return value.clone()
    by_objective = {1: present, 2: present & present.unsqueeze(-1)}.get(value.ndim)
    if by_objective is None or value.shape != by_objective.shape:
        return value.clone()
    return torch.where(by_objective, value, torch.nan)
