"""Scales learned with the model: uncertainty weighting, and the loss balance of IMTL.

A. Kendall, Y. Gal, R. Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
Geometry and Semantics, CVPR 2018, arXiv:1705.07115. L. Liu et al., Towards Impartial Multi-task
Learning, ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import Number, entries, number

_FACTORS = {"regression": 0.5, "classification": 1.0}


class Kinds(NamedTuple):
    """What each loss is, by name, and the factor that it gets for that."""

    names: str | tuple[str, ...]
    factor: float | Tensor  # or (m,)

    def __repr__(self) -> str:
        """Return the names, as they were given."""
        return repr(self.names if isinstance(self.names, str) else list(self.names))


class UWState(NamedTuple):
    """State of `uw`, trained by the user."""

    log_variance: Tensor  # (m,)


class IMTLLState(NamedTuple):
    """State of `imtl_l`, trained by the user."""

    log_scale: Tensor  # (m,)


def _uw_init(losses: Tensor, key: Tensor | None, *, start: Number) -> UWState:
    """Start all variances alike."""
    return UWState(number(start, losses).expand(losses.shape).clone())


def _uw_update(
    losses: Tensor, state: UWState, *, kind: Kinds, present: Tensor | None = None
) -> tuple[Tensor, UWState]:
    """Add the negative log-likelihoods, up to constants."""
    _check.state_type("uw", state, UWState)
    _check.state("uw", "log_variance", state.log_variance, losses.shape)
    factor = kind.factor
    if isinstance(factor, Tensor):
        factor = entries("kind", factor, losses, 1.0)
    scaled = factor * torch.exp(-state.log_variance) * losses
    return only(present, scaled + state.log_variance / 2).sum(), state


def _imtl_l_init(losses: Tensor, key: Tensor | None) -> IMTLLState:
    """Start all scales at 1."""
    return IMTLLState(torch.zeros_like(losses))


def _imtl_l_update(
    losses: Tensor, state: IMTLLState, *, present: Tensor | None = None
) -> tuple[Tensor, IMTLLState]:
    """Add the scaled losses, less the logarithms of the scales."""
    _check.state_type("imtl_l", state, IMTLLState)
    _check.state("imtl_l", "log_scale", state.log_scale, losses.shape)
    return only(present, torch.exp(state.log_scale) * losses - state.log_scale).sum(), state


def uw(kind: str | Sequence[str] = "regression", *, start: Number = 0.0) -> Scalarizer:
    r"""Weigh each loss by its learned uncertainty.

    $$s = \sum_i k_i e^{-s_i} L_i + \tfrac12 s_i, \qquad
    \frac{\partial s}{\partial L_i} = k_i e^{-s_i}, \qquad
    \frac{\partial s}{\partial s_i} = \tfrac12 - k_i e^{-s_i} L_i.$$

    $s_i = \log \sigma_i^2$ is the log-variance of task `i`; $k_i$ is 1/2 for a regression and 1 for
    a classification. The state holds the log-variances, and NOTHING here trains them: differentiate
    with respect to the state too, and hand both gradients to the optimiser. Left alone they are
    constants. Assumes positive losses; a negative one drives its log-variance to minus infinity.

    Args:
        kind: `"regression"` or `"classification"`, one for all tasks or one for each.
        start: Initial log-variance.

    Returns:
        The Scalarizer; its state is trained with the parameters.

    Raises:
        ValueError: If a kind is unknown.

    Differs from other implementations:
        LibMTL starts at -0.5: weights 0.824 instead of 0.5.
        SamsungLabs' code has $k_i = 1$ for every task.

    References:
        A. Kendall, Y. Gal, R. Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for
        Scene Geometry and Semantics, CVPR 2018, https://arxiv.org/abs/1705.07115

    Example:
        >>> import torch, torchjd_func as jd
        >>> scalarizer = jd.scalarizers.uw()
        >>> def loss(trained, target):
        ...     params, state = trained
        ...     return scalarizer((params - target).square(), state)[0]
        >>> params, state = torch.zeros(2), scalarizer.init(torch.zeros(2))
        >>> torch.func.grad(loss)((params, state), torch.tensor([1.0, 2.0]))
        (tensor([-1., -2.]), UWState(log_variance=tensor([ 0.0000, -1.5000])))
    """
    _check.interval("start", start, -math.inf, open_low=True)
    kinds = _check.choices("kind", kind, _FACTORS)
    factors = torch.tensor([_FACTORS[one] for one in kinds], dtype=torch.float64)
    known = Kinds(kind, _FACTORS[kind]) if isinstance(kind, str) else Kinds(kinds, factors)
    return Scalarizer("uw", partial(_uw_init, start=start), partial(_uw_update, kind=known))


def imtl_l() -> Scalarizer:
    r"""Weigh each loss by a learned scale that drives all scaled losses to 1.

    $$s = \sum_i e^{s_i} L_i - s_i, \qquad \frac{\partial s}{\partial L_i} = e^{s_i}, \qquad
    \frac{\partial s}{\partial s_i} = e^{s_i} L_i - 1.$$

    The state holds the log-scales, and NOTHING here trains them: see `uw`, whose double this is at
    $-s$. Assumes positive losses.

    Returns:
        The Scalarizer; its state is trained with the parameters.

    Differs from other implementations:
        LibMTL's IMTL applies IMTL-G to the gradients of the scaled losses, here `jd.imtl_g()` on
        an objective that scales them.

    References:
        L. Liu, Y. Li, Z. Kuang, J.-H. Xue, Y. Chen, W. Yang, Q. Liao, W. Zhang, Towards Impartial
        Multi-task Learning, ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr

    Example:
        >>> import torch, torchjd_func as jd
        >>> scalarizer, losses = jd.scalarizers.imtl_l(), torch.tensor([0.5, 3.0])
        >>> torch.func.grad(lambda state: scalarizer(losses, state)[0])(scalarizer.init(losses))
        IMTLLState(log_scale=tensor([-0.5000,  2.0000]))
    """
    return Scalarizer("imtl_l", _imtl_l_init, _imtl_l_update)
