"""MoDo: multi-objective gradient with double sampling.

L. Chen, H. Fernando, Y. Ying, T. Chen, Three-Way Trade-Off in Multi-Objective Learning:
Optimization, Generalization and Conflict-Avoidance, NeurIPS 2023, arXiv:2305.20057.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._types import Weighting
from torchjd_func.linalg import project_simplex


class MoDoState(NamedTuple):
    """The weights, which move a little at each call."""

    weights: Tensor  # (m,) float64, on the simplex


def _init(statistic: Tensor, key: Tensor | None) -> MoDoState:
    """Start from uniform weights."""
    m = statistic.shape[0]
    return MoDoState(statistic.new_full((m,), 1 / max(m, 1), dtype=torch.float64))


def _update(
    cross_gramian: Tensor,
    state: MoDoState,
    losses: Tensor | None,
    *,
    gamma: float | Tensor,
    rho: float | Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, MoDoState]:
    """Take one projected gradient step on the weights (equation 2.9a)."""
    _check.state_type("modo", state, MoDoState)
    _check.state("modo", "weights", state.weights, cross_gramian.shape[:1])
    current = _present.alone(present, state.weights)
    moved = current - gamma * (cross_gramian @ current + rho * current)
    weights = project_simplex(_present.only(present, moved, -torch.inf))
    return weights, MoDoState(_present.together(present, weights, state.weights))


def modo(gamma: float | Tensor = 0.1, rho: float | Tensor = 0.1) -> Weighting:
    r"""Move the weights towards the min-norm point, one unbiased step at each call.

    $$\lambda_{t+1} = \Pi_\Delta\big(\lambda_t - \gamma (J_1 J_2^\top + \rho I) \lambda_t\big).$$

    $J_1, J_2$ are the Jacobians of two independent batches, so that $J_1 J_2^\top$ is an unbiased
    estimate of the Gramian of the whole data; the Gramian of one batch is not. The parameters then
    move along $\tfrac12 (J_1 + J_2)^\top \lambda_{t+1}$, or $J_3^\top \lambda_{t+1}$ of a third
    batch: see `jd.double_sampling`. The state holds $\lambda$. Where objectives are absent, the
    others share the weight that they had together.

    Args:
        gamma: Step of the weights, in units of one over a squared gradient; stable below
            $2 / \lambda_{\max}(G + \rho I)$. A 0-d tensor may be vmapped or changed.
        rho: Pull towards uniform weights, in units of a squared gradient.

    Returns:
        The Weighting of a cross-Gramian; `jd.weighted` makes it an Aggregator of a single batch.

    Raises:
        ValueError: If `gamma` is not positive, or `rho` negative.

    Differs from other implementations:
        LibMTL has `gamma=1e-3`.

    References:
        L. Chen, H. Fernando, Y. Ying, T. Chen, Three-Way Trade-Off in Multi-Objective Learning:
        Optimization, Generalization and Conflict-Avoidance, NeurIPS 2023 and JMLR 25, 2024,
        https://arxiv.org/abs/2305.20057

    Example:
        >>> import torch, torchjd_func as jd
        >>> cross_gramian = torch.tensor([[15.0, -19.0], [-15.0, 31.0]])
        >>> weights, state = jd.modo(gamma=0.01)(cross_gramian)
        >>> weights
        tensor([0.5500, 0.4500])
    """
    options = {
        "gamma": _check.interval("gamma", gamma, 0, open_low=True),
        "rho": _check.interval("rho", rho, 0),
    }
    return Weighting("modo", _init, partial(_update, **options), needs="cross_gramian")
