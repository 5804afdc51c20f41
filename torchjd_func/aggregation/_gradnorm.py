"""GradNorm: gradient normalisation for adaptive loss balancing.

Z. Chen, V. Badrinarayanan, C.-Y. Lee, A. Rabinovich, GradNorm, ICML 2018, arXiv:1711.02257.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting
from torchjd_func.aggregation._rows import safe_sqrt

NAME = "gradnorm"


class GradNormState(NamedTuple):
    """The weights of the next call, and the losses of the first of each objective."""

    weights: Tensor  # (m,) float64, of sum m
    initial_losses: Tensor  # (m,) float64
    visits: Tensor  # (m,) int64, how often each objective was there


def _init(statistic: Tensor, key: Tensor | None) -> GradNormState:
    """Start from weights of 1."""
    m = statistic.shape[:1]
    return GradNormState(
        statistic.new_ones(m, dtype=torch.float64),
        statistic.new_zeros(m, dtype=torch.float64),
        statistic.new_zeros(m, dtype=torch.int64),
    )


def _update(
    gramian: Tensor,
    state: GradNormState,
    losses: Tensor | None,
    *,
    alpha: float | Tensor,
    lr: float | Tensor,
    parametrization: str,
    present: Tensor | None = None,
) -> tuple[Tensor, GradNormState]:
    """Return the weights as they are, then take one step on the balance of the gradient norms."""
    _check.state_type(NAME, state, GradNormState)
    _check.state(NAME, "weights", state.weights, gramian.shape[:1])
    _check.state(NAME, "visits", state.visits, gramian.shape[:1])
    losses = _check.losses_present(NAME, losses)
    initial = torch.where(state.visits == 0, losses, state.initial_losses)

    mean = partial(_present.mean, present)
    current = _present.alone(present, state.weights, _present.count(present, gramian))
    norms = safe_sqrt(gramian.diagonal())
    scaled = current * norms
    targets = mean(scaled) * _inverse_rates(losses, initial, mean) ** alpha
    slope = torch.sign(scaled - targets) * norms  # of sum_i |w_i norms_i - targets_i|
    step = _softmax_step if parametrization == "softmax" else _renormalized_step
    moved = _present.together(present, step(current, lr, slope, present), state.weights)
    after = GradNormState(moved, initial, state.visits + 1)
    return current, _present.renewed(present, after, state)


def _inverse_rates(losses: Tensor, initial: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each loss relative to its start, divided by the mean of these; 1 where undefined."""
    known = initial > 0
    left = torch.where(known, losses / torch.where(known, initial, 1.0), 1.0).clamp(min=0)
    average = mean(left)
    return torch.where(average > 0, left / torch.where(average > 0, average, 1.0), 1.0)


def _renormalized_step(
    weights: Tensor, lr: float | Tensor, slope: Tensor, present: Tensor | None
) -> Tensor:
    """Take a step on the weights, then bring their sum back to `m`."""
    moved = (weights - lr * slope).clamp(min=0)
    average = _present.mean(present, moved)
    return torch.where(average > 0, moved / torch.where(average > 0, average, 1.0), 1.0)


def _softmax_step(
    weights: Tensor, lr: float | Tensor, slope: Tensor, present: Tensor | None
) -> Tensor:
    """Take a step on the logits `s` of `w = m softmax(s)`."""
    logit_slope = weights * (slope - _present.mean(present, weights * slope))
    logits = _present.only(present, weights.log() - lr * logit_slope, -torch.inf)
    return _present.count(present, weights) * torch.softmax(logits, dim=0)


def gradnorm(
    alpha: float | Tensor = 1.5,
    lr: float | Tensor = 0.025,
    *,
    parametrization: str = "renormalized",
) -> Aggregator:
    r"""Weigh the gradients so that slow tasks get longer ones.

    $$N_i = w_i \lVert g_i \rVert, \qquad
    r_i = \frac{L_i / L_i(0)}{\operatorname{mean}_j L_j / L_j(0)}, \qquad
    w \leftarrow w - \eta\, \partial_w \sum_i \big| N_i - \bar N r_i^\alpha \big|,$$

    the target $\bar N r_i^\alpha$ held constant, then $w$ is rescaled to the sum `m`. The
    direction uses the weights before the update. Losses have to be positive; where one starts at
    zero its rate counts as average. The state holds the weights and the first losses. Where
    objectives are absent, the others share the weight that they had together. The
    paper measures norms at the last shared layer alone: for that, hand its Gramian to the
    weighting. A good `lr` is in proportion to one over the norms. May conflict with objectives.

    Args:
        alpha: Restoring force; 0 equalises the norms.
        lr: $\eta$, of plain gradient descent on the weights.
        parametrization: Descend on the weights, clamped at zero and `"renormalized"` (the paper),
            or on the logits of their `"softmax"` (LibMTL).

    Returns:
        The Aggregator.

    Raises:
        ValueError: If the losses are missing, or an option is unknown or out of range.

    Differs from other implementations:
        LibMTL optimises logits with the optimiser of the network, and takes the average losses of
        the first epoch for the initial ones.
        Weights are clamped at zero; the paper does not say what to do when one would turn negative.

    References:
        Z. Chen, V. Badrinarayanan, C.-Y. Lee, A. Rabinovich, GradNorm: Gradient Normalization for
        Adaptive Loss Balancing in Deep Multitask Networks, ICML 2018,
        https://arxiv.org/abs/1711.02257

    Example:
        >>> import torch, torchjd_func as jd
        >>> gramian, losses = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([1.0, 1.0])
        >>> _, state = jd.gradnorm(lr=0.1).weighting(gramian, losses=losses)
        >>> state.weights
        tensor([0.8421, 1.1579], dtype=torch.float64)
    """
    _check.choice("parametrization", parametrization, ("renormalized", "softmax"))
    options = {"alpha": _check.interval("alpha", alpha, 0), "lr": _check.interval("lr", lr, 0)}
    update = partial(_update, parametrization=parametrization, **options)
    return weighted(Weighting(NAME, _init, update))
