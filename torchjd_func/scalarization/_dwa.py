"""DWA: dynamic weight average.

S. Liu, E. Johns, A. J. Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019,
arXiv:1803.10704.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._present import Present, only
from torchjd_func._types import PyTree, Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    count,
    number,
    observable,
    observed,
    present_softmax,
    renewed,
)


class DWAState(NamedTuple):
    """State of `dwa`."""

    total: Tensor  # (m,), sum of the losses since the last epoch ended
    step: Tensor  # (m,) int64, number of losses since then
    newer: Tensor  # (m,), average of the last epoch, zero before there is one
    older: Tensor  # (m,), average of the epoch before it


def _init(losses: Tensor, key: Tensor | None) -> DWAState:
    """Start without history."""
    zero = torch.zeros_like(losses)
    return DWAState(zero, torch.zeros_like(zero, dtype=torch.int64), zero.clone(), zero.clone())


def _update(
    losses: Tensor, state: DWAState, *, temperature: Number, present: Tensor | None = None
) -> tuple[Tensor, DWAState]:
    """Weigh by the rate of the last two epochs, and count this batch."""
    _check.state_type("dwa", state, DWAState)
    _check.state("dwa", "total", state.total, losses.shape)
    known = state.older != 0
    rate = torch.where(known, state.newer / torch.where(known, state.older, 1.0), 1.0)
    weights = count(losses, present) * present_softmax(rate / number(temperature, losses), present)
    total = state.total + only(present, losses.detach())
    step = state.step + (1 if present is None else present)
    return (weights.detach() * losses).sum(), DWAState(total, step, state.newer, state.older)


def _observe(losses: PyTree, state: DWAState, *, present: Present = None) -> DWAState:
    """End an epoch; a loss without an average and without a call had none."""
    known = state.step > 0 if losses is None else torch.ones_like(state.step, dtype=torch.bool)
    mask = observable("dwa", present, known)
    if losses is None:
        average = state.total / state.step.clamp(min=1)
    else:
        average = observed("dwa", losses, state.total, mask)
    zero, none = torch.zeros_like(state.total), torch.zeros_like(state.step)
    ended = DWAState(zero, none, average, state.newer)
    return renewed(mask, average, ended, state)


def dwa(temperature: Number = 2.0) -> Scalarizer:
    r"""Weigh most the losses that fell least from one epoch to the next.

    $$s = \sum_i \lambda_i L_i, \qquad \lambda = m\,\mathrm{softmax}(r / T), \qquad
    r_i = \frac{\bar L_i(t-1)}{\bar L_i(t-2)}, \qquad \frac{\partial s}{\partial L_i} = \lambda_i.$$

    $\bar L_i(t)$ is the average over epoch `t`. Weights are constants, sum to `m`, and are 1 in the
    first two epochs. The state holds the sum over the current epoch and the averages of the last
    two. At the end of an epoch call `state = scalarizer.observe(None, state)`; to use averages of
    your own, such as those of validation, pass them instead of `None`. A loss that is absent from
    some batches is averaged over the others; from an epoch, it keeps its averages.

    Args:
        temperature: `T`, positive; the larger, the more uniform the weights. A tensor may be
            vmapped.

    Returns:
        The Scalarizer, with `observe` for the end of an epoch.

    Raises:
        ValueError: If `temperature` is not positive.

    Differs from other implementations:
        Where an average is zero the rate is 1, elsewhere it is infinite or NaN.
        The Nash-MTL and SamsungLabs codes take windows of 25 calls, and the mean of the terms: call
        `observe` as often, and divide by `m`.

    References:
        S. Liu, E. Johns, A. J. Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019,
        https://arxiv.org/abs/1803.10704

    Example:
        >>> import torch, torchjd_func as jd
        >>> scalarizer, losses = jd.scalarizers.dwa(), torch.tensor([0.5, 3.0])
        >>> state = scalarizer.init(losses)
        >>> for epoch in [[1.0, 4.0], [0.8, 3.6]]:
        ...     _, state = scalarizer(torch.tensor(epoch), state)
        ...     state = scalarizer.observe(None, state)
        >>> scalarizer(losses, state)[0]
        tensor(3.5625)
    """
    update = partial(
        _update, temperature=_check.interval("temperature", temperature, 0, open_low=True)
    )
    return Scalarizer("dwa", _init, update, _observe)
