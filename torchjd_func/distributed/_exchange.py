"""One step of a rule whose rows, or shares of rows, are spread over processes.

A rule that weighs by Gramians is given columns: a process gets its part of the columns of all `m`
rows, the partial Gramians are added up, each process solves for the same weights and combines its
columns, and the direction is gathered. The Jacobian travels once and is nowhere whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _present, _tree
from torchjd_func._lift import statistic_like
from torchjd_func._shares import Part, Shares, Size, same, scaled, step_of
from torchjd_func._types import Aggregator, Partition, Processes, PyTree, State, Weighting
from torchjd_func.distributed import _collectives, _handshake, _layout
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._mean import average, shares, total


class Exchange(NamedTuple):
    """What processes make of the `k` rows that each of them has: the `m` rows of the rule."""

    count: Callable[[int, Group], int]  # k -> m
    losses: Callable[[Tensor, Group], Tensor]  # (k,) -> (m,)
    rows: Callable[[Tensor, Group], Tensor]  # (k, n) -> (m, n), on each process
    columns: Callable[[Tensor, Group], Tensor]  # (k, n) -> (m, n / world), those of this process
    weights: Callable[[Tensor, Group], Tensor]  # (m,) -> (k,), those of the rows of this process
    shares: Callable[[Tensor, Tensor | None, Size, Group], Shares]  # of (k,), as `shares_of`
    trusted: bool  # whether rows of weight 0 hold finite numbers


def spread(
    rule: Aggregator,
    name: str,
    exchange: Exchange,
    group: Group,
    check: bool,
    part: Part | None = None,
) -> Aggregator:
    """Return the rule of all processes together, with the state of `rule`."""
    bound = {"rule": rule, "exchange": exchange, "group": group}
    part = Part() if part is None else part
    processes = Processes(
        partial(average, group=group),
        partial(factors, size=part.size, group=group),
        partial(spread, rule, name, exchange, group, check),
        partial(_handshake.agreed, groups=(group,), check=check),
    )
    update = partial(_update, name=name, part=part, check=check, **bound)
    return Aggregator(name, partial(_init, name=name, **bound), update, processes=processes)


def factors(losses: Tensor, present: Tensor | None, *, size: Size, group: Group) -> Tensor:
    """Return factors `(m,)` that make weighted means of means."""
    return shares(losses, present, size, group).factors


def _init(
    jac: PyTree,
    key: Tensor | None,
    *,
    name: str,
    rule: Aggregator,
    exchange: Exchange,
    group: Group,
) -> State:
    """Start the rule on all rows, once all processes agree on them."""
    _handshake.check_start(name, {"rule options": repr(rule), "jac": jac}, key, group)
    return rule.init(_all_rows(jac, exchange, group), key=key)


def _all_rows(jac: PyTree, exchange: Exchange, group: Group) -> PyTree:
    """Return placeholders for the rows of the rule."""
    m = exchange.count(_tree.leading_size(jac), group)
    return _tree.map(lambda leaf: _tree.placeholder(leaf, (m, *leaf.shape[1:])), jac)


def _update(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    *,
    name: str,
    rule: Aggregator,
    exchange: Exchange,
    group: Group,
    part: Part,
    check: bool,
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Weigh what this process has, and bring it together with that of others."""
    part = part._replace(losses=part.losses if exchange.trusted else "")  # or each has its own
    before = {} if rule.columnwise else same("state", state)
    step = step_of(part, present, rule=name, jac=jac, losses=losses, **before)
    jac, losses = _handshake.agreed(step, (group,), check)((jac, losses))
    if present is None and part.size is None:
        return _together(jac, state, losses, None, rule, exchange, group)
    like = _tree.leaves(jac)[0].new_ones(_tree.leading_size(jac), dtype=torch.float64)
    own = exchange.shares(like, present, part.size, group)
    jac = scaled(jac, own)
    losses = None if losses is None else scaled(losses, own)
    mask = None if present is None and exchange.shares is shares else own.anywhere
    grads, after = _together(jac, state, losses, mask, rule, exchange, group)
    if mask is None:  # all objectives are there, or, without any example, none
        grads = _tree.map(lambda leaf: torch.where(own.anywhere.any(), leaf, 0), grads)
        after = _present.kept(own.anywhere, after, state)
    return grads, after


def _together(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    present: Tensor | None,
    rule: Aggregator,
    exchange: Exchange,
    group: Group,
) -> tuple[PyTree, State]:
    """Take the cheapest way that the rule allows."""
    losses = None if losses is None else exchange.losses(losses, group)
    if rule.weighting is not None and rule.weighting.needs == "size":
        statistic = statistic_like(_all_rows(jac, exchange, group))
        weights, state = rule.weighting(statistic, state, losses=losses, present=present)
        own = exchange.weights(weights, group)
        kept = _tree.map(lambda leaf: _kept(leaf, own, exchange.trusted), jac)
        return total(_tree.weighted_sum(kept, own), group), state
    if rule.weighting is None and rule.partition is None and not rule.columnwise:
        rows = _layout.transfer(jac, lambda rows: exchange.rows(rows, group))
        return rule(rows, state, losses=losses, present=present)
    return _by_columns(jac, state, losses, present, rule, exchange, group)


def _by_columns(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    present: Tensor | None,
    rule: Aggregator,
    exchange: Exchange,
    group: Group,
) -> tuple[PyTree, State]:
    """Deal the columns out, aggregate them, and gather the direction."""
    flat, rebuild = _tree.flatten(jac)
    world = _collectives.size(group)
    groups, weigh = _partition(rule, _tree.paths(jac))
    blocks = _layout.blocks(flat, groups, world)
    parts = [exchange.columns(_layout.matrix(block, flat, world), group) for block in blocks]
    if rule.columnwise:
        vectors, state = rule(parts, state, losses=losses, present=present)
    else:
        gramians = _collectives.all_reduce(_gramians(blocks, parts), group)
        weights, state = weigh(gramians, state, losses, present)
        pairs = zip(blocks, parts, strict=True)
        vectors = [_combine(block, part, weights, exchange.trusted) for block, part in pairs]
    found: dict[int, Tensor] = {}
    for block, vector in zip(blocks, vectors, strict=True):
        row = _collectives.all_gather(vector, group).unsqueeze(0)
        found.update(_layout.leaves(block, row, flat, world))
    return rebuild([leaf.squeeze(0) for leaf in _tree.in_order(found)]), state


def _partition(rule: Aggregator, paths: Sequence[str]) -> Partition:
    """Return the groups of leaves that the rule weighs, and how; by default one."""
    if rule.partition is not None:
        return rule.partition(paths)
    return Partition((tuple(range(len(paths))),), partial(_weigh_all, rule.weighting))


def _weigh_all(
    weighting: Weighting | None,
    gramians: Tensor,
    state: State,
    losses: Tensor | None,
    present: Tensor | None,
) -> tuple[Tensor, State]:
    """Weigh the Gramian of the one group."""
    assert weighting is not None
    weights, state = weighting(gramians[0], state, losses=losses, present=present)
    return weights.unsqueeze(0), state


def _gramians(blocks: list[_layout.Block], parts: list[Tensor]) -> Tensor:
    """Return what the columns of this process add to the Gramian of each group, `(g, m, m)`."""
    split = [part.split(block.widths, dim=1) for block, part in zip(blocks, parts, strict=True)]
    return torch.stack([_tree.gramian(list(group)) for group in zip(*split, strict=True)])


def _combine(block: _layout.Block, part: Tensor, weights: Tensor, trusted: bool) -> Tensor:
    """Return the columns of this process of the direction, each group by its weights `(g, m)`."""
    pairs = zip(part.split(block.widths, dim=1), weights.unbind(), strict=True)
    return torch.cat([_tree.weighted_sum(_kept(*pair, trusted), pair[1]) for pair in pairs])


def _kept(rows: Tensor, weights: Tensor, trusted: bool) -> Tensor:
    """Return rows, without those of weight 0 if they may hold what is not a number."""
    along = weights.reshape(-1, *[1] * (rows.ndim - 1))
    return rows if trusted else torch.where(along == 0, 0.0, rows)
