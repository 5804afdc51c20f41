"""Parts of one batch on several ranks, and the rule on the means of losses and of gradients."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._present import Present
from torchjd_func._types import Aggregator, PyTree, Scalarizer, State, Weighting
from torchjd_func.distributed import _collectives, _handshake
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._exchange import Exchange, spread
from torchjd_func.distributed._mean import everywhere, mean, scaled, share

Rule = TypeVar("Rule", Aggregator, Scalarizer)


def data_parallel(rule: Rule, group: Group = None) -> Rule:
    r"""Run a rule on the mean over ranks, each of which has a part of the batch.

    $$L_i = \frac1W \sum_{r=1}^W L_i^{(r)}, \qquad J = \frac1W \sum_{r=1}^W J^{(r)}, \qquad
    G = J J^\top \neq \frac1W \sum_{r=1}^W J^{(r)} J^{(r)\top}.$$

    Losses are means over the part of a rank, and parts are equal, so that all is as in one process
    with the whole batch: the same direction on each rank, the same state, the same random numbers
    from the same key. The Jacobian is averaged before the Gramian is taken, but never whole: with
    `n` parameters, `n'` = `n` rounded up to a multiple of `W`, each rank is sent `n' / W` columns,
    adds its share to the Gramian, solves for the weights, and combines its columns. Numbers that a
    rank hands to collectives (see `jd.distributed` for bytes, and for times):

    | rule | numbers |
    |---|---|
    | weights from Gramians, of `g` groups (`jd.grouped`; else `g = 1`) | `(m + 1) n' + g m^2 + m` |
    | weights that look at no gradient (`jd.mean`, `jd.rlw`) | `n + m` |
    | a Scalarizer | `n + m` |
    | `jd.trimmed_mean`, column by column | `(m + 1) n' + m` |
    | all others that need the rows | `m n + m`, all of it all-reduced, and all work on each rank |

    with `n'` summed over groups and dtypes. With `present`, on all ranks or on none, an objective
    is present if it is on any rank, its loss and its gradient are means over the ranks that have
    it, and `m` numbers more are added up. Pass a finished rule: combinators go inside. In
    `jd.grad`, gradients of heads (`jd.multitask`) are averaged as well; losses that it returns stay
    those of the rank: see `jd.distributed.mean`. Differentiate a Scalarizer by `jd.grad`, or
    average its gradient yourself.

    Args:
        rule: An Aggregator or a Scalarizer.
        group: The ranks; by default all.

    Returns:
        A rule of the type of `rule`, and with its state: a state may go on with `rule` in one
        process, or on another number of ranks.

    Raises:
        TypeError: If `rule` is neither.
        ValueError: If `rule` is a Weighting; at `init`, on all ranks, if shapes, dtypes, keys or
            rules differ between ranks (`jd.distributed.check_same`).
        RuntimeError: If another rank has ended, naming this rank and the collective. In a compiled
            function torch's own error, which names neither.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> rule = jd.distributed.data_parallel(jd.upgrad())
        >>> rule(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))[0]
        tensor([0.5000, 1.5000])
        >>> dist.destroy_process_group()
    """
    if isinstance(rule, Weighting):
        _check.not_a_weighting("data_parallel", rule)
    _check.combinable("data_parallel", rule, (Aggregator, Scalarizer))
    name = f"data_parallel({rule.name})"
    if isinstance(rule, Aggregator):
        return spread(rule, name, MEAN, group)
    bound = {"rule": rule, "group": group}
    return Scalarizer(
        name,
        partial(_init, name=name, **bound),
        partial(_update, **bound),
        None if rule.observe is None else partial(_observe, **bound),
        partial(mean, group=group),
    )


def _count(k: int, group: Group) -> int:
    """Return the number of rows: that of each rank."""
    return k


def _rows(rows: Tensor, group: Group) -> Tensor:
    """Return the mean rows."""
    return _collectives.all_reduce(share(rows, group), group)


def _columns(rows: Tensor, group: Group) -> Tensor:
    """Return the columns of this rank of the mean rows."""
    return _collectives.reduce_scatter(share(rows, group), group)


MEAN = Exchange(_count, mean, _rows, _columns, share, everywhere, trusted=True)


def _init(
    losses: Tensor,
    key: Tensor | None,
    *,
    name: str,
    rule: Scalarizer,
    group: Group,
) -> State:
    """Start the scalarizer, once all ranks agree on the losses."""
    _handshake.check_start(name, {"losses": losses}, key, group)
    return rule.init_fn(losses, key)


def _update(
    losses: Tensor,
    state: State,
    *,
    rule: Scalarizer,
    group: Group,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Scalarize the mean losses, of which those of this rank are differentiated."""
    if present is not None:
        here = present
        present, factors = everywhere(here, group)
        losses = scaled(losses, here, factors)
    constant = losses.detach()
    return rule(mean(constant, group) + (losses - constant), state, present=present)


def _observe(
    losses: PyTree, state: State, *, rule: Scalarizer, group: Group, present: Present = None
) -> State:
    """Let the scalarizer observe the mean losses, if any."""
    assert rule.observe is not None
    constant = _tree.map(Tensor.detach, losses)
    if present is None:
        return rule.observe(mean(constant, group), state)
    device = _tree.leaves((losses, state))[0].device
    here = _tree.ravel([torch.as_tensor(flag, device=device) for flag in _tree.leaves(present)])
    mask, factors = everywhere(here, group)
    if losses is not None:
        constant = mean(scaled(_tree.ravel(constant), here, factors), group)
    return rule.observe(constant, state, present=mask)
