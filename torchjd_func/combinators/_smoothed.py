"""CR-MOGM: weights averaged over the steps.

S. Zhou, W. Zhang, J. Jiang, W. Zhong, J. Gu, W. Zhu, On the Convergence of Stochastic
Multi-Objective Gradient Manipulation and Beyond, NeurIPS 2022.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _names, _present
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import State, Weighting
from torchjd_func.combinators._through_weighting import Rule, through_weighting


class SmoothedState(NamedTuple):
    """The averaged weights, and the state of the rule that makes the weights."""

    weights: Tensor  # (m,) float64
    step: Tensor  # (m,) int64, number of weights averaged
    inner: State


def _init(
    statistic: Tensor, key: Tensor | None, *, inner: Weighting, initial_weights: Vector | None
) -> SmoothedState:
    """Start from the initial weights, if any."""
    m = statistic.shape[0]
    weights = statistic.new_zeros((m,), dtype=torch.float64)
    if initial_weights is not None:
        start = _names.entries("initial_weights", initial_weights, weights)
        weights = start.clone()  # the state shares no memory
    step = torch.zeros_like(weights, dtype=torch.int64)
    return SmoothedState(weights, step, inner.init_fn(statistic, key))


def _update(
    statistic: Tensor,
    state: SmoothedState,
    losses: Tensor | None,
    *,
    inner: Weighting,
    alpha: float | Tensor,
    initial_weights: Vector | None,
    present: Tensor | None = None,
) -> tuple[Tensor, SmoothedState]:
    """Mix the weights of the inner rule into the average."""
    name = _name(inner)
    _check.state_type(name, state, SmoothedState)
    _check.state(name, "weights", state.weights, statistic.shape[:1])
    fresh, inner_state = _present.update(inner, statistic, state.inner, losses, present=present)
    weights = alpha * state.weights + (1 - alpha) * fresh
    if initial_weights is None:
        weights = torch.where(state.step == 0, fresh, weights)
    weights = _present.renewed(present, weights, state.weights)
    step = state.step + (1 if present is None else present)
    return weights, SmoothedState(weights, step, inner_state)


def _name(inner: Weighting) -> str:
    """Return the name of the combination."""
    return f"smoothed({inner.name})"


def _wrap(inner: Weighting, *, alpha: float | Tensor, initial_weights: Vector | None) -> Weighting:
    """Return the averaging Weighting."""
    init = partial(_init, inner=inner, initial_weights=initial_weights)
    update = partial(_update, inner=inner, alpha=alpha, initial_weights=initial_weights)
    return Weighting(_name(inner), init, update, inner.needs, inner.widen, inner.robust)


def smoothed(
    rule: Rule,
    alpha: float | Tensor = 0.9,
    *,
    initial_weights: Numbers | None = None,
) -> Rule:
    r"""Average the weights of a rule over the steps.

    $$\lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k, \qquad
    d = J^\top \lambda_k,$$

    with $\hat\lambda_k$ the weights of `rule`. Weights found on noisy batches are correlated with
    the noise, which biases the direction; averaging removes that. It also loses guarantees that
    `rule` gives for a single step, such as not conflicting. The weight of an absent objective keeps
    its average. The state holds $\lambda$ and the state of `rule`.

    Args:
        rule: A Weighting, or an Aggregator with one.
        alpha: Share of the past, in `[0, 1]`: 0 passes `rule` through, 1 freezes the weights. The
            paper lets it grow to 1 while the learning rate decays: pass a tensor, and make the rule
            anew at each step.
        initial_weights: `(m,)`, $\lambda_0$; by default the first weights of `rule`.

    Returns:
        A rule of the type of `rule`, needing the same statistic.

    Raises:
        TypeError: If `rule` is neither a Weighting nor an Aggregator.
        ValueError: If the Aggregator has no weighting, or `alpha` is out of range.

    Differs from other implementations:
        None; TorchJD's `CRMOGMWeighting` has the same default.

    References:
        S. Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
        Beyond, NeurIPS 2022,
        https://proceedings.neurips.cc/paper_files/paper/2022/hash/f91bd64a3620aad8e70a27ad9cb3ca57-Abstract-Conference.html

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.smoothed(jd.mgda()).weighting
        >>> weights, state = rule(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        >>> weights, state = rule(torch.eye(2), state)
        >>> weights
        tensor([0.5900, 0.4100])
    """
    _check.interval("alpha", alpha, 0, 1)
    start = initial_weights
    initial = None if start is None else _check.per_loss("initial_weights", start)
    wrap = partial(_wrap, alpha=alpha, initial_weights=initial)
    return through_weighting("smoothed", rule, wrap)
