"""FERERO: descent to where the losses are in given proportions.

L. Chen, A. Saif, Y. Shen, T. Chen, FERERO: A Flexible Framework for Preference-Guided
Multi-Objective Learning, NeurIPS 2024, arXiv:2412.01773.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _names, _present
from torchjd_func._lift import weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, Weighting
from torchjd_func.linalg import project_simplex

NAME = "ferero"


class FereroState(NamedTuple):
    """Both multipliers, which move a little at each call."""

    weights: Tensor  # (m,) float64, on the simplex, of the objectives
    push: Tensor  # (m,) float64, orthogonal to the preference, of the constraint


def _init(statistic: Tensor, key: Tensor | None) -> FereroState:
    """Start from uniform weights and no push."""
    m = statistic.shape[0]
    uniform = statistic.new_full((m,), 1 / max(m, 1), dtype=torch.float64)
    return FereroState(uniform, torch.zeros_like(uniform))


def _update(
    gramian: Tensor,
    state: FereroState,
    losses: Tensor | None,
    *,
    preference: Vector,
    gamma: float | Tensor,
    drift: float | Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, FereroState]:
    """Take one step on the dual of the program for the direction (single loop)."""
    _check.state_type(NAME, state, FereroState)
    _check.state(NAME, "weights", state.weights, gramian.shape[:1])
    values = _present.only(present, _check.losses_present(NAME, losses))
    ray = _present.only(present, _names.entries("preference", preference, gramian))
    current, push = _present.alone(present, state.weights), _present.only(present, state.push)
    slope = gramian @ _normalized(current + push)
    moved = _present.only(present, current - gamma * slope, -torch.inf)
    weights = project_simplex(moved)
    away = slope - drift * values
    push = push - gamma * (away - ray * ((ray @ away) / (ray @ ray)))
    kept = _present.together(present, weights, state.weights)
    after = FereroState(kept, _present.renewed(present, push, state.push))
    return _normalized(weights + _present.only(present, push)), after


def _normalized(weights: Tensor) -> Tensor:
    """Return weights whose absolute values have the sum 1."""
    return weights / weights.abs().sum()


def ferero(
    preference: Numbers, gamma: float | Tensor = 1e-3, *, drift: float | Tensor = 0.5
) -> Aggregator:
    r"""Descend on all losses, and to where they are in the proportions of a preference.

    $$\lambda \leftarrow \Pi_\Delta(\lambda - \gamma G w), \qquad
    u \leftarrow u - \gamma P (G w - c L), \qquad
    w \leftarrow \frac{\lambda + u}{\lVert \lambda + u \rVert_1}, \qquad d = J^\top w,$$

    with $P = I - p p^\top / p^\top p$, so that $P L = 0$ where the losses are proportional to `p`.
    One step at each call on the dual of the program for the direction that improves the losses
    most, while their distance from the ray of `p` shrinks at the rate `c`. A loss may rise on the
    way to the ray, and weights may be negative. The state holds $\lambda$ and `u`.

    Args:
        preference: `p`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; not negative, not all 0. The larger, the larger
            the loss may be. A tensor may be vmapped.
        gamma: Step of the multipliers, in units of one over a squared gradient. A 0-d tensor may be
            vmapped or changed.
        drift: `c`, how fast the losses return to the ray.

    Returns:
        The Aggregator, with state; needs `losses=`.

    Raises:
        ValueError: If `gamma` is not positive, `drift` or a number in `preference` is negative, or
            losses are missing.

    Differs from other implementations:
        The authors' code has `gamma = 1e-5`, restarts from uniform weights at each step, and is for
        two losses, where it takes `u` along $(p_2, -p_1)$, as here for a `p` of length 1.

    References:
        L. Chen, A. Saif, Y. Shen, T. Chen, FERERO: A Flexible Framework for Preference-Guided
        Multi-Objective Learning, NeurIPS 2024, https://arxiv.org/abs/2412.01773

    Example:
        >>> import torch, torchjd_func as jd
        >>> rows, losses = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0])
        >>> jd.ferero([1.0, 1.0], 0.1)(rows, losses=losses)[0]
        tensor([0.6500, 0.6750])
    """
    options = {
        "preference": _check.per_loss("preference", preference, low=0),
        "gamma": _check.interval("gamma", gamma, 0, open_low=True),
        "drift": _check.interval("drift", drift, 0),
    }
    return weighted(Weighting(NAME, _init, partial(_update, **options)))
