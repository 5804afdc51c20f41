"""Groups of parameters that are aggregated apart.

The grouping strategies of Z. Wang et al., Gradient Vaccine: Investigating and Improving Multi-task
Optimization in Massively Multilingual Models, ICLR 2021, arXiv:2010.05874, for any rule.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree, random
from torchjd_func._present import Present
from torchjd_func._types import Aggregator, Partition, PyTree, State, Weighting
from torchjd_func.combinators._labels import Labels, by_path, label_all


class GroupedState(NamedTuple):
    """The states of the groups, for each method in the order of the groups' first leaves."""

    inner: tuple[State, ...]  # stacked, (g, ...); or an `EachState`


class EachState(NamedTuple):
    """The states of groups that are served one by one, as a method without a weighting has to."""

    states: tuple[State, ...]  # for each group


class _Share(NamedTuple):
    """A method and the groups that it serves; at once, if it has a weighting."""

    method: Aggregator
    groups: _tree.Groups


Methods = Aggregator | Mapping[Any, Aggregator]  # for all groups, or by label
Plan = Callable[[Sequence[str]], list[_Share]]


def _init(jac: PyTree, key: Tensor | None, *, plan: Plan) -> GroupedState:
    """Give each group a state, and a key, of its own."""
    flat, paths, place, inner = _tree.leaves(jac), _tree.paths(jac), 0, []
    for method, groups in plan(paths):
        states = []
        for group in groups:
            own = None if key is None else random.fold_in(key, place)
            states.append(method.init(_part(flat, paths, group), key=own))
            place += 1
        each = EachState(tuple(states))
        inner.append(each if method.weighting is None else _tree.stack(states))
    return GroupedState(tuple(inner))


def _update(
    jac: PyTree,
    state: GroupedState,
    losses: Tensor | None,
    *,
    name: str,
    plan: Plan,
    present: Tensor | None = None,
) -> tuple[PyTree, GroupedState]:
    """Let each method serve its groups."""
    flat, rebuild = _tree.flatten(jac)
    paths = _tree.paths(jac)
    shares = plan(paths)
    found, inner = {}, []
    for share, own in zip(shares, _inner(name, state, shares), strict=True):
        if share.method.weighting is None:
            grads, after = _serve_rows(share, flat, paths, own, losses, present)
        else:
            blocks = _tree.blocks(flat, share.groups)
            gramians = _tree.gramians(blocks, share.groups)
            weights, after = _weigh(share.method.weighting, gramians, own, losses, present)
            grads = _tree.weighted_sums(blocks, share.groups, weights, flat)
        found.update(grads)
        inner.append(after)
    return rebuild(_tree.in_order(found)), GroupedState(tuple(inner))


def _serve_rows(
    share: _Share,
    flat: list[Tensor],
    paths: list[str],
    each: EachState,
    losses: Tensor | None,
    present: Tensor | None,
) -> tuple[dict[int, Tensor], EachState]:
    """Aggregate group by group."""
    found, inner = {}, []
    for group, state in zip(share.groups, each.states, strict=True):
        part = _part(flat, paths, group)
        grads, after = share.method(part, state, losses=losses, present=present)
        found.update({place: grads[paths[place]] for place in group})
        inner.append(after)
    return found, EachState(tuple(inner))


def _partition(paths: Sequence[str], *, name: str, plan: Plan) -> Partition:
    """Return all groups, in the order of the state, and what weighs their Gramians."""
    shares = plan(paths)
    groups = tuple(group for share in shares for group in share.groups)
    return Partition(groups, partial(_weigh_all, name, shares))


def _weigh_all(
    name: str,
    shares: list[_Share],
    gramians: Tensor,
    state: GroupedState | None,
    losses: Tensor | None,
    present: Present = None,
) -> tuple[Tensor, GroupedState]:
    """Let each method weigh the Gramians of its groups."""
    parts = gramians.split([len(share.groups) for share in shares])
    states = _fresh(shares, parts) if state is None else _inner(name, state, shares)
    methods = [share.method.weighting for share in shares]
    pairs = [
        _weigh(method, part, own, losses, present)
        for method, part, own in zip(methods, parts, states, strict=True)
        if method is not None
    ]
    weights, inner = zip(*pairs, strict=True)
    return torch.cat(weights), GroupedState(inner)


def _weigh(
    weighting: Weighting, gramians: Tensor, state: State, losses: Tensor | None, present: Present
) -> tuple[Tensor, State]:
    """Weigh `(g, m, m)` Gramians at once, each with its own state."""

    def weigh(gramian: Tensor, own: State) -> tuple[Tensor, State]:
        return weighting(gramian, own, losses=losses, present=present)

    weights, state = vmap(weigh)(gramians, state)
    # A state whose strides change from call to call would be compiled twice; `contiguous` leaves
    # those of a single group as they are.
    return weights, _tree.map(partial(torch.clone, memory_format=torch.contiguous_format), state)


def _fresh(shares: list[_Share], parts: Sequence[Tensor]) -> tuple[State, ...]:
    """Return fresh states, without a key, for the Gramians of the groups."""
    return tuple(
        _tree.stack([share.method.init(part[0])] * len(part))
        for share, part in zip(shares, parts, strict=True)
    )


def _inner(name: str, state: GroupedState, shares: list[_Share]) -> tuple[State, ...]:
    """Return the states of the methods, after a check that they belong to these groups."""
    _check.state_type(name, state, GroupedState)
    _check.state_groups(name, len(state.inner), len(shares))
    for (method, groups), own in zip(shares, state.inner, strict=True):
        if method.weighting is None:
            _check.state_type(name, own, EachState)
        parts = _tree.leaves(own) if method.weighting is not None else [own.states]
        for part in parts:
            _check.state_groups(name, len(part), len(groups))
    return state.inner


def _part(flat: list[Tensor], paths: Sequence[str], group: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the Jacobian of one group, by the names of its parameters."""
    return {paths[place]: flat[place] for place in group}


def _plan(paths: Sequence[str], *, aggregator: Methods, labels: Labels) -> list[_Share]:
    """Return the groups of each method, in the order of their first leaves."""
    _check.distinct("params", paths)
    label_of = label_all(labels, paths)
    if isinstance(aggregator, Mapping):
        _check.grouping(label_of, aggregator)
    groups: dict[Hashable, list[int]] = {}
    for place, label in enumerate(label_of):
        groups.setdefault(label, []).append(place)
    served: dict[Aggregator, list[tuple[int, ...]]] = {m: [] for m in _methods(aggregator)}
    for label, group in groups.items():
        method = aggregator[label] if isinstance(aggregator, Mapping) else aggregator
        served[method].append(tuple(group))
    return [_Share(method, tuple(own)) for method, own in served.items()]


def _methods(aggregator: Methods) -> list[Aggregator]:
    """Return the methods, each once."""
    each = aggregator.values() if isinstance(aggregator, Mapping) else [aggregator]
    return list(dict.fromkeys(each))


def _checked(aggregator: Methods) -> Methods:
    """Return one method for all groups, or a copy of those by label."""
    if not isinstance(aggregator, Aggregator | Mapping) or not aggregator:
        remedy = "Pass one Aggregator for all groups, or {label: Aggregator}."
        _check.fail(TypeError, "`aggregator`", "be a jd.Aggregator or a dict", aggregator, remedy)
    for method in _methods(aggregator):
        _check.combinable("grouped", method, (Aggregator,))
    return dict(aggregator) if isinstance(aggregator, Mapping) else aggregator


def grouped(
    aggregator: Methods,
    labels: Callable[[str], Hashable] | PyTree,
) -> Aggregator:
    r"""Aggregate groups of parameters apart, each with a state of its own.

    $$d = (d_1, \dots, d_g), \qquad d_k = A_k(J_k), \qquad J = (J_1 \mid \dots \mid J_g).$$

    Objectives that conflict in one layer may agree in another, and are then left alone there; in
    return, guarantees hold group by group: a direction that no group finds in conflict is in
    conflict with no objective, but the smallest change, or the smallest norm, of each group need
    not be that of the whole. Groups that share a method are solved in one batched call, on the
    Gramians of the groups, each the sum of its leaves' Gramians: many groups cost about one solve.
    A method that needs the rows is called group by group. `jd.grad` takes the Gramian route of its
    `route`, with one Gramian for each group, unless some method needs the rows.

    The state holds, for each method, the states of its groups, stacked. Group k of a random method
    draws with `jd.random.fold_in(key, k)`. Groups are counted by method, in the order of the
    mapping, and then by their first leaf.

    Args:
        aggregator: One for all groups, or `{label: Aggregator}`; labels that are given the same
            object are solved together.
        labels: A function from the name of a parameter, such as `"encoder.0.weight"`, to a label:
            `jd.together`, `jd.by_network`, `jd.by_layer`, `jd.by_tensor`, or your own. Or a pytree
            of labels, like the parameters, or shallower: a label counts for all names that start
            with its own, up to a dot; the longest counts. With a tuple of `argnums`, names start
            with the place in the tuple.

    Returns:
        The Aggregator, without `.weighting`: a direction of its own for each group is not a
        combination of whole gradients. So wrap `aggregator`, not the result, in `jd.smoothed`.

    Raises:
        TypeError: If `aggregator` holds anything but Aggregators, or a label cannot be hashed.
        ValueError: At the first call, if `labels` and `aggregator` do not have the same labels, or
            a pytree of labels does not fit the parameters.

    Differs from other implementations:
        TorchJD's documentation loops over groups, with an aggregator object for each. LibMTL groups
        shared parameters only, as a whole, by layer or by tensor.

    References:
        Z. Wang, Y. Tsvetkov, O. Firat, Y. Cao, Gradient Vaccine: Investigating and Improving
        Multi-task Optimization in Massively Multilingual Models, ICLR 2021,
        https://arxiv.org/abs/2010.05874

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = {"a": torch.tensor([[-4.0], [6.0]]), "b": torch.ones(2, 2)}
        >>> jd.grouped(jd.upgrad(), jd.by_tensor)(jac)[0]
        {'a': tensor([0.]), 'b': tensor([1., 1.])}
    """
    own = _checked(aggregator)
    _check.labels(labels)
    methods, plan = _methods(own), partial(_plan, aggregator=own, labels=by_path(labels))
    name = f"grouped({', '.join(method.name for method in methods)})"
    apart = all(method.weighting is not None for method in methods)
    return Aggregator(
        name,
        partial(_init, plan=plan),
        partial(_update, name=name, plan=plan),
        partition=partial(_partition, name=name, plan=plan) if apart else None,
    )
