"""FAMO: fast adaptive multitask optimization.

B. Liu, Y. Feng, P. Stone, Q. Liu, FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023,
arXiv:2306.03792.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._names import Vector
from torchjd_func._present import Present, only
from torchjd_func._types import PyTree, Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    Numbers,
    entries,
    number,
    observable,
    observed,
    optional,
    present_softmax,
    renewed,
)

_EPS = 1e-8  # of the paper's code: D = L - b + eps, and of Adam
_BETA_1, _BETA_2 = 0.9, 0.999


class FAMOState(NamedTuple):
    """State of `famo`."""

    logits: Tensor  # (m,), xi
    first: Tensor  # (m,), running mean of the gradient of the logits
    second: Tensor  # (m,), running mean of its square
    step: Tensor  # (m,) int64, number of updates of the logits
    before: Tensor  # (m,), log D at the last call
    pending: Tensor  # (m,) bool, what that call had and is not yet observed


def _init(losses: Tensor, key: Tensor | None) -> FAMOState:
    """Start with uniform weights."""
    zero = torch.zeros_like(losses)
    step = torch.zeros_like(zero, dtype=torch.int64)
    pending = torch.zeros_like(zero, dtype=torch.bool)
    return FAMOState(zero, zero.clone(), zero.clone(), step, zero.clone(), pending)


def _log_gap(losses: Tensor, min_losses: Vector | None, present: Tensor | None) -> Tensor:
    """Return `log D`, with the gap `D = L - b + eps`."""
    gap = losses - entries("min_losses", min_losses, losses, 0.0) + _EPS
    return only(present, gap, 1.0).log()


def _update(
    losses: Tensor,
    state: FAMOState,
    *,
    min_losses: Vector | None,
    present: Tensor | None = None,
) -> tuple[Tensor, FAMOState]:
    """Combine the logarithms of the gaps, so that the weights of the losses sum to 1."""
    _check.state_type("famo", state, FAMOState)
    _check.state("famo", "logits", state.logits, losses.shape)
    log_gap = _log_gap(losses, min_losses, present)
    z, before = present_softmax(state.logits.detach(), present), log_gap.detach()
    c = 1 / (z * torch.exp(-before)).sum()
    called = torch.ones_like(state.pending) if present is None else present.clone()
    before = torch.where(called, before, state.before)
    return c * (z * log_gap).sum(), state._replace(before=before, pending=called)


def _observe(
    losses: PyTree,
    state: FAMOState,
    *,
    min_losses: Vector | None,
    beta: Number,
    gamma: Number,
    optimizer: str,
    present: Present = None,
) -> FAMOState:
    """Move the logits; tasks that improved most lose weight. Without a call nothing moves."""
    moves = observable("famo", present, state.pending)
    after = _log_gap(observed("famo", losses, state.logits, moves), min_losses, moves)
    delta, z = state.before - after, present_softmax(state.logits, _present.usable(moves))
    slope = z * (delta - (z * delta).sum()) + number(gamma, z) * state.logits
    first = _BETA_1 * state.first + (1 - _BETA_1) * slope
    second = _BETA_2 * state.second + (1 - _BETA_2) * slope.square()
    step = state.step + 1
    if optimizer == "adam":
        slope = first / (1 - _BETA_1 ** step.to(z))
        slope = slope / ((second / (1 - _BETA_2 ** step.to(z))).sqrt() + _EPS)
    logits = state.logits - number(beta, z) * slope
    moved = FAMOState(logits, first, second, step, state.before, torch.zeros_like(state.pending))
    return renewed(moves, logits, moved, state)


def famo(
    beta: Number = 0.025,
    gamma: Number = 1e-3,
    *,
    min_losses: Numbers | None = None,
    optimizer: str = "adam",
) -> Scalarizer:
    r"""Decrease all losses at about the same relative rate, at the price of one backward pass.

    $$s = c \sum_i z_i \log D_i, \qquad z = \mathrm{softmax}(\xi), \quad D = L - b + 10^{-8}, \quad
    c = \Big(\sum_i z_i / D_i\Big)^{-1}, \qquad
    \frac{\partial s}{\partial L_i} = c\, z_i / D_i.$$

    `z` and `c` are constants, so that the weights of the gradients are positive and sum to 1. After
    the step compute the losses of the SAME batch again and call
    `state = scalarizer.observe(losses, state)`: with $\delta = \log D^{before} - \log D^{after}$
    the logits move against the gradient $z \circ (\delta - z^\top \delta) + \gamma \xi$. The state
    holds the logits, the moments of their optimiser, and the last losses. Assumes `L > b`. What was
    absent from the call is not observed either: its losses are not read, its logit stays.

    Args:
        beta: Step size of the logits. A tensor may be vmapped.
        gamma: Decay of the logits; `1e-3` in the paper, other values in its scripts.
        min_losses: `b`, `(m,)`, a lower bound of each loss; zeros by default.
        optimizer: Of the logits: `"adam"`, as in the paper's experiments and all codes, whose first
            step has length `beta` whatever $\delta$; `"sgd"`, the plain step of its Algorithm 1.

    Returns:
        The Scalarizer, with `observe` for the time after the step.

    Raises:
        ValueError: If `beta` or `gamma` is negative, or `optimizer` is unknown.

    Differs from other implementations:
        The official code also clips the norm of the gradient to 1; that is left to the optimiser.
        The official class has `gamma=1e-5`, its stand-alone file 0.01.
        An observation without a call before it changes nothing; TorchJD raises, or repeats it.

    References:
        B. Liu, Y. Feng, P. Stone, Q. Liu, FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023,
        https://arxiv.org/abs/2306.03792

    Example:
        >>> import torch, torchjd_func as jd
        >>> scalarizer = jd.scalarizers.famo()
        >>> loss, state = scalarizer(torch.tensor([0.5, 3.0]))
        >>> scalarizer.observe(torch.tensor([0.45, 2.9]), state).logits
        tensor([-0.0250,  0.0250])
    """
    _check.choice("optimizer", optimizer, ("adam", "sgd"))
    bounds = optional("min_losses", min_losses)
    options = {
        "beta": _check.interval("beta", beta, 0),
        "gamma": _check.interval("gamma", gamma, 0),
        "optimizer": optimizer,
    }
    observe = partial(_observe, min_losses=bounds, **options)
    return Scalarizer("famo", _init, partial(_update, min_losses=bounds), observe)
