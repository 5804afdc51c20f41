"""What is not finite: it comes out as not-a-number, and leaves the state as it was.

So an overflow is seen in the result, a step that is skipped is forgotten, and of a population that
is mapped only the member that diverged is lost.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host, _present, _tree

PyTree = Any
State = Any
TINY = torch.finfo(torch.float64).tiny


def weigh(
    rule: Any, statistic: Tensor, state: State, losses: Tensor | None, present: Tensor | None
) -> tuple[Tensor, State]:
    """Call the `update_fn` of a Weighting on a statistic that is finite, or on a stand-in."""
    trusted = rule.robust or rule.needs == "size"
    # Decompositions of the host raise on what is not finite, for all members of a batch.
    sound = None if trusted or statistic.is_cuda else finite(statistic, losses)
    if sound is not None:
        identity = torch.eye(len(statistic), dtype=statistic.dtype, device=statistic.device)
        statistic = torch.where(sound, statistic, identity)
        losses = None if losses is None else torch.where(sound, losses, 1)
    statistic = statistic if rule.needs == "size" else without_subnormal(statistic)
    weights, after = _present.update(rule, statistic, state, losses, present=present)
    _check.weights(rule.name, weights, len(statistic))
    if sound is not None:
        weights = torch.where(sound, weights, torch.nan)
    elif statistic.is_cuda and not trusted:
        weights = weights + nothing(statistic, losses)
    return weights, keep(weights, after, state)


def without_subnormal(gramian: Tensor) -> Tensor:
    """Return a Gramian with 0 for what is so short that its reciprocal is infinite."""
    if gramian.dtype != torch.float64:
        return gramian
    known = _host.numbers(gramian)
    if known is not None and known.diagonal().min() >= TINY:
        return gramian
    shrunk = torch.nn.functional.hardshrink(gramian, TINY)
    if _host.unwatched(gramian):
        return shrunk
    # Its derivative is 0 at 0, where rows are orthogonal, and what follows may have another one.
    return gramian - torch.where(shrunk == 0, gramian, 0.0).detach()


def keep(result: PyTree, after: State, before: State) -> State:
    """Return the next state, in the dtypes of before; that of before if a result is not finite."""
    if (isinstance(after, tuple) and not after) or not _tree.same_structure(after, before):
        return after  # none, or one that `jd.testing.check` finds at fault
    return _tree.map(partial(_kept, finite(*_tree.leaves(result))), after, before)


def _kept(sound: Tensor | None, new: Any, old: Any) -> Any:
    """Return a leaf of the next state; what did not change is the same tensor, and a leaf still."""
    if new is old:
        return old
    _check.state_leaf(new)
    if new.dtype != old.dtype:  # of rows or losses in another dtype than those it began with
        new = new.to(old.dtype)
    return new if sound is None else torch.where(sound, new, old)


def finite(*tensors: Tensor | None) -> Tensor | None:
    """Say `()` whether all numbers are finite; `None` if that is known without waiting."""
    present, flags = [x for x in tensors if x is not None], []
    if present and present[0].is_cuda:
        return nothing(*present) == 0
    for x in present:
        numbers = _host.numbers(x)
        if numbers is None or not np.isfinite(numbers).all():
            flags.append(x.isfinite().all())
    return torch.stack(flags).all() if flags else None


def nothing(*tensors: Tensor | None) -> Tensor:
    """Return 0, or not-a-number if any number is not finite, in few launches."""
    parts = [(0 * x.detach()).sum() for x in tensors if x is not None]
    return reduce(torch.add, parts)


def masked_weights(
    weighting: Any, matrix: Tensor, state: State, losses: Tensor | None, present: Tensor
) -> tuple[Tensor, State]:
    """Weigh what is there: all else is taken out before, and gets the weight 0."""
    seen = matrix if weighting.needs == "size" else _present.statistic(matrix, present)
    known, counted = _present.losses(losses, present), _present.usable(present)
    weights, after = weigh(weighting, seen, state, known, counted)
    return torch.where(present, weights, 0), _present.kept(present, after, state)


def aggregated(
    aggregator: Any, jac: PyTree, state: State, losses: Tensor | None, present: Tensor | None
) -> tuple[PyTree, State]:
    """Call the `update_fn` of an Aggregator; where there is a weighting, weights are checked."""
    grads, after = _present.update(aggregator, jac, state, losses, present=present)
    if aggregator.weighting is None:
        _check.grads(aggregator.name, grads, _tree.leaves(grads), _tree.leaves(jac))
    return grads, after


def masked_grads(
    aggregator: Any, jac: PyTree, state: State, losses: Tensor | None, present: Tensor
) -> tuple[PyTree, State]:
    """Aggregate what is there: all else is taken out before."""
    seen, known = _present.rows(jac, present), _present.losses(losses, present)
    counted = _present.usable(present)
    grads, after = aggregated(aggregator, seen, state, known, counted)
    after = keep(grads, after, state)
    grads = _tree.map(lambda leaf: torch.where(present.any(), leaf, 0), grads)
    return grads, _present.kept(present, after, state)
