"""Parts of one batch on several processes, and the rule on the means of losses and gradients."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._present import Present
from torchjd_func._shares import Part, Size, same, scaled, step_of
from torchjd_func._types import Aggregator, Processes, PyTree, Scalarizer, State, Weighting
from torchjd_func.distributed import _collectives, _handshake
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._exchange import Exchange, factors, spread
from torchjd_func.distributed._mean import average, share, shares

Rule = TypeVar("Rule", Aggregator, Scalarizer)


def data_parallel(rule: Rule, group: Group = None, *, check: bool = True) -> Rule:
    r"""Run a rule on the mean over processes, each of which has a part of the batch.

    $$L_i = \frac{\sum_r b_r L_i^{(r)}}{\sum_r b_r}, \qquad
    J = \frac{\sum_r b_r J^{(r)}}{\sum_r b_r}, \qquad
    G = J J^\top \neq \frac1W \sum_{r=1}^W J^{(r)} J^{(r)\top}.$$

    Losses are means over the part of a process. With `size=`, on the call of what `jd.grad`
    returns, process `r` says how many examples `b_r` it has; without it, parts count alike, and
    batches have one length. So all is as in one process with the whole batch: the same direction on
    each process, the same state, the same random numbers from the same key:

        grads, losses, state = step(state, params, x, y, size=len(x))  # 0 examples too

    What a process without examples passes counts for nothing, NaN included. The Jacobian is
    averaged before the Gramian is taken, but never whole: with `n` parameters, `n'` = `n` rounded
    up to a multiple of `W`, each process is sent `n' / W` columns, adds its share to the Gramian,
    solves for the weights, and combines its columns. Numbers that a process hands to collectives
    (see `jd.distributed` for bytes, and for times), and 4 more for `check`:

    | rule | numbers |
    |---|---|
    | weights from Gramians, of `g` groups (`jd.grouped`; else `g = 1`) | `(m + 1) n' + g m^2 + m` |
    | weights that look at no gradient (`jd.mean`, `jd.rlw`) | `n + m` |
    | a Scalarizer | `n + m` |
    | `jd.trimmed_mean`, column by column | `(m + 1) n' + m` |
    | all others that need the rows | `m n + m`, all-reduced, and all work on each process |

    with `n'` summed over groups and dtypes. With `present`, on all processes or on none, an
    objective is present if it is on any process, its loss and its gradient are means over the
    processes that have it, and `m` numbers more are added up, as they are with `size`. Pass a
    finished rule: combinators go inside. In `jd.grad`, gradients of heads (`jd.multitask`) are
    averaged as well, zeros where no process has the loss; losses that it returns stay those of the
    process: see `jd.distributed.mean`. `observe` of a Scalarizer takes these, and averages them:
    `rule.observe(losses, state, size=len(x))`. Differentiate a Scalarizer by `jd.grad`, or average
    its gradient yourself. For losses of plain autograd, `jd.interop.backward_` takes `size` too.

    Args:
        rule: An Aggregator or a Scalarizer.
        group: The processes; by default all.
        check: Whether each step compares, by one small all-reduce, that all processes call the same
            rule on the same shapes and names of losses, with or without `present` and `size`, and
            from the same state: those that differ are named at once, where collectives would hang
            until their time-out, or mix up numbers. `jd.init_state`, and steps whose state is
            `None`, compare the numbers of the parameters. Floats may differ by rounding. It waits
            for the result, in a compiled function when its graph runs.

    Returns:
        A rule of the type of `rule`, and with its state: a state may go on with `rule` in one
        process, or on another number of processes.

    Raises:
        TypeError: If `rule` is neither.
        ValueError: If `rule` is a Weighting; from `jd.grad`, if losses are those of single examples
            (`jd.distributed.gathered` is for these); on all processes, at `init` or a step, if
            shapes, dtypes, keys, rules or options differ (`jd.distributed.check_same`).
        RuntimeError: If another process has ended, or does not come within the time-out of the
            group, naming this process and the collective.

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
    _collectives.valid(group)
    _check.flag("check", check)
    name = f"data_parallel({rule.name})"
    if isinstance(rule, Aggregator):
        return spread(rule, name, MEAN, group, check)
    return _scalarizer(rule, name, group, check)


def _scalarizer(
    rule: Scalarizer, name: str, group: Group, check: bool, part: Part | None = None
) -> Scalarizer:
    """Return the scalarizer of all processes together, with the state of `rule`."""
    bound = {"rule": rule, "group": group}
    part = Part() if part is None else part
    return Scalarizer(
        name,
        partial(_init, name=name, **bound),
        partial(_update, name=name, part=part, check=check, **bound),
        None if rule.observe is None else partial(_observe, name=name, check=check, **bound),
        Processes(
            partial(average, group=group),
            partial(factors, size=part.size, group=group),
            partial(_scalarizer, rule, name, group, check),
            partial(_handshake.agreed, groups=(group,), check=check),
        ),
    )


def _count(k: int, group: Group) -> int:
    """Return the number of rows: that of each process."""
    return k


def _rows(rows: Tensor, group: Group) -> Tensor:
    """Return the mean rows."""
    return _collectives.all_reduce(share(rows, group), group)


def _columns(rows: Tensor, group: Group) -> Tensor:
    """Return the columns of this process of the mean rows."""
    return _collectives.reduce_scatter(share(rows, group), group)


MEAN = Exchange(_count, average, _rows, _columns, share, shares, trusted=True)


def _init(
    losses: Tensor,
    key: Tensor | None,
    *,
    name: str,
    rule: Scalarizer,
    group: Group,
) -> State:
    """Start the scalarizer, once all processes agree on the losses."""
    step = {"rule options": repr(rule), "losses": losses}
    _handshake.check_start(name, step, key, group)
    return rule.init_fn(losses, key)


def _update(
    losses: Tensor,
    state: State,
    *,
    name: str,
    rule: Scalarizer,
    group: Group,
    part: Part,
    check: bool,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Scalarize the mean losses, of which those of this process are differentiated."""
    step = step_of(part, present, rule=name, losses=losses.detach(), **same("state", state))
    losses = _handshake.agreed(step, (group,), check)(losses)
    own = None
    if present is not None or part.size is not None:
        own = shares(losses.detach(), present, part.size, group)
        losses = scaled(losses, own)
        present = own.anywhere if present is not None else None
    constant = losses.detach()
    loss, after = rule(average(constant, group) + (losses - constant), state, present=present)
    if own is None or present is not None:
        return loss, after
    return torch.where(own.anywhere.any(), loss, 0), _present.kept(own.anywhere, after, state)


def _observe(
    losses: PyTree,
    state: State,
    *,
    name: str,
    rule: Scalarizer,
    group: Group,
    check: bool,
    present: Present = None,
    size: Size = None,
) -> State:
    """Let the scalarizer observe the mean losses, if any."""
    assert rule.observe is not None
    _check.size(size, True)
    constant = _tree.map(Tensor.detach, losses)
    if _tree.leaves(constant):
        named = {"rule": f"{name}.observe", "losses": constant, **same("state", state)}
        step = step_of(Part(size), present, **named)
        constant = _handshake.agreed(step, (group,), check)(constant)
    if present is None and (size is None or losses is None):
        return rule.observe(average(constant, group), state)
    device = _tree.leaves((losses, state))[0].device
    flags = _tree.leaves(present) or [torch.ones_like(_tree.ravel(constant), dtype=torch.bool)]
    here = _tree.ravel([torch.as_tensor(flag, device=device) for flag in flags])
    own = shares(here.to(torch.float64), here, size, group)
    if losses is not None:
        constant = average(scaled(_tree.ravel(constant), own), group)
    if present is None:
        return _present.kept(own.anywhere, rule.observe(constant, state), state)
    return rule.observe(constant, state, present=own.anywhere)
