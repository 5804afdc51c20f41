"""The worst losses: conditional value at risk, and distributionally robust groups.

R. T. Rockafellar, S. Uryasev, Optimization of Conditional Value-at-Risk, J. Risk 2, 2000.
S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang, Distributionally Robust Neural Networks for Group
Shifts, ICLR 2020, arXiv:1911.08731.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import Number, count, number, pure


class GroupDROState(NamedTuple):
    """State of `group_dro`."""

    log_weights: Tensor  # (m,), logarithms of weights that sum to 1


def _cvar(losses: Tensor, *, alpha: Number, present: Tensor | None = None) -> Tensor:
    """Average the worst share of the losses; the last of them may count in part."""
    return _top(losses, number(alpha, losses) * count(losses, present), present)


def _top_k(losses: Tensor, *, k: int, present: Tensor | None = None) -> Tensor:
    """Average the `k` largest losses."""
    _check.interval("k", k, 1, losses.shape[0])
    return _top(losses, count(losses, present).clamp(max=k), present)


def _top(losses: Tensor, size: Tensor, present: Tensor | None) -> Tensor:
    """Average the `size` largest losses, `size` being any positive number."""
    place = torch.arange(losses.shape[0], dtype=losses.dtype, device=losses.device)
    weights = (size - place).clamp(0, 1) / size
    ordered = only(present, losses, -torch.inf).sort(descending=True, stable=True).values
    return (weights * torch.where(weights > 0, ordered, 0.0)).sum()


def _init(losses: Tensor, key: Tensor | None) -> GroupDROState:
    """Start with equal weights."""
    return GroupDROState(torch.full_like(losses, -math.log(losses.shape[0])))


def _update(
    losses: Tensor, state: GroupDROState, *, eta: Number, present: Tensor | None = None
) -> tuple[Tensor, GroupDROState]:
    """Step the weights up the losses, and use them; what is absent keeps its weight."""
    _check.state_type("group_dro", state, GroupDROState)
    _check.state("group_dro", "log_weights", state.log_weights, losses.shape)
    logits = state.log_weights.detach() + number(eta, losses) * losses.detach()
    log_shares = torch.log_softmax(only(present, logits, -torch.inf), 0)
    loss = (log_shares.exp() * losses).sum()
    if present is None:
        return loss, GroupDROState(log_shares)
    total = only(present, state.log_weights.detach(), -torch.inf).logsumexp(0)
    return loss, GroupDROState(torch.where(present, log_shares + total, state.log_weights))


def cvar(alpha: Number = 0.5, *, k: int | None = None) -> Scalarizer:
    r"""Average the largest losses: the conditional value at risk.

    $$s = \frac1{\alpha m} \Big(\sum_{i \le \lfloor \alpha m \rfloor} L_{(i)} +
    (\alpha m - \lfloor \alpha m \rfloor)\, L_{(\lfloor \alpha m \rfloor + 1)}\Big), \qquad
    L_{(1)} \ge L_{(2)} \ge \dots$$

    The weight of a gradient is that of its loss: $1 / (\alpha m)$ among the worst, 0 elsewhere. The
    maximum for $\alpha \le 1/m$, the mean for $\alpha = 1$. Among equal losses the first count.

    Args:
        alpha: Share of the losses that count, above 0, at most 1. A tensor may be vmapped.
        k: Number of losses that count, instead of a share; all, where fewer are present.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `alpha` or `k` is out of range.

    Differs from other implementations:
        The mean of the `k` largest losses, as others have it, is `k=`.

    References:
        R. T. Rockafellar, S. Uryasev, Optimization of Conditional Value-at-Risk, J. Risk 2, 2000,
        https://doi.org/10.21314/JOR.2000.038

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.cvar(0.5)(torch.tensor([1.0, 2.0, 4.0]))[0]
        tensor(3.3333)
    """
    if k is not None:
        return pure("cvar", partial(_top_k, k=_check.interval("k", k, 1)))
    return pure("cvar", partial(_cvar, alpha=_check.interval("alpha", alpha, 0, 1, open_low=True)))


def group_dro(eta: Number = 0.01) -> Scalarizer:
    r"""Weigh the losses by their history, exponentially: train for the worst group.

    $$w \leftarrow \frac{w \circ e^{\eta L}}{\sum_j w_j e^{\eta L_j}}, \qquad
    s = \sum_i w_i L_i, \qquad \frac{\partial s}{\partial L_i} = w_i.$$

    Weights are constants and sum to 1; they are updated, then used. The state holds their
    logarithms.

    Args:
        eta: Step size of the weights, at least 0, in one over the unit of the losses. A tensor may
            be vmapped.

    Returns:
        The Scalarizer, with the weights as state.

    Raises:
        ValueError: If `eta` is negative.

    Differs from other implementations:
        The official code keeps the weights themselves, which underflow to zero for good.
        Its adjustment for the sizes of the groups is left to the losses.

    References:
        S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang, Distributionally Robust Neural Networks for
        Group Shifts, ICLR 2020, https://arxiv.org/abs/1911.08731

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.group_dro(1.0)(torch.tensor([0.5, 3.0]))[0]
        tensor(2.8104)
    """
    eta = _check.interval("eta", eta, 0)
    return Scalarizer("group_dro", _init, partial(_update, eta=eta))
