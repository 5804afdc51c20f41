"""Pareto MTL: each model descends in the sector of its own preference vector.

X. Lin, H.-L. Zhen, Z. Li, Q. Zhang, S. Kwong, Pareto Multi-Task Learning, NeurIPS 2019,
arXiv:1912.12854.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchjd_func import _check, _host
from torchjd_func.linalg import nnqp
from torchjd_func.linalg._gramian import ratio
from torchjd_func.sets._types import SetRule


class ParetoMTLState(NamedTuple):
    """State of `pareto_mtl`."""

    step: Tensor  # () int64
    descending: Tensor  # (k,) bool: the second stage has begun


def _init(gramians: Tensor, key: Tensor | None) -> ParetoMTLState:
    """Begin with the search for the sectors."""
    step = gramians.new_zeros((), dtype=torch.int64)
    return ParetoMTLState(step, gramians.new_zeros(gramians.shape[:1], dtype=torch.bool))


def _update(
    gramians: Tensor,
    losses: Tensor,
    state: ParetoMTLState,
    *,
    preferences: Tensor,
    n_feasibility_steps: int | Tensor,
    margin: float | Tensor,
) -> tuple[Tensor, ParetoMTLState]:
    """Combine the gradients of the losses, from the second stage on, and of active constraints."""
    k, m = losses.shape
    _check.state_type("pareto_mtl", state, ParetoMTLState)
    _check.state("pareto_mtl", "descending", state.descending, (k,))
    _check.preference_for_each(preferences, k, m)
    rows, active = _constraints(_host.to(preferences, losses), losses, margin)
    due = ~active.any(-1) | (state.step >= n_feasibility_steps)
    begun = state.descending | (due & losses.isfinite().all(-1))
    every = torch.eye(m, dtype=losses.dtype, device=losses.device).expand(k, m, m)
    rows = torch.cat([every, rows], 1)  # (k, m + k, m), times J_i
    chosen = torch.cat([begun.unsqueeze(-1).expand(k, m), active], 1)
    shares = min_norm_among(rows @ gramians @ rows.mT, chosen)
    weights = (shares.unsqueeze(1) @ rows).squeeze(1)
    return weights, ParetoMTLState(state.step + 1, begun)


def _constraints(
    preferences: Tensor, losses: Tensor, margin: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return `u_j - u_i` `(k, k, m)`, and which of them model i violates `(k, k)`."""
    units = ratio(
        preferences, vector_norm(preferences, dim=-1, keepdim=True).expand_as(preferences)
    )
    rows = units - units.unsqueeze(1)
    excess = (rows * losses.unsqueeze(1)).sum(-1)
    active = excess > -margin * vector_norm(losses, dim=-1, keepdim=True)
    return rows, active & (rows != 0).any(-1)


def min_norm_among(gramians: Tensor, chosen: Tensor) -> Tensor:
    """Return the weights of the shortest convex combination of the chosen rows.

    As `jd.linalg.min_norm_point`, with the other unknowns cut off: `Q` is the identity for them.
    """
    both = chosen.unsqueeze(-1) & chosen.unsqueeze(-2)
    diagonal = gramians.diagonal(0, -2, -1).detach()
    shortest = torch.where(chosen & (diagonal > 0), diagonal, torch.inf).amin(-1, keepdim=True)
    kappa = torch.where(shortest < torch.inf, shortest, 1.0)
    identity = torch.eye(chosen.shape[-1], dtype=gramians.dtype, device=gramians.device)
    matrix = torch.where(both, gramians + kappa.unsqueeze(-1), identity)
    value = nnqp(matrix, torch.where(chosen, -kappa, 0.0)).value
    return value / value.sum(-1, keepdim=True)


def pareto_mtl(
    preferences: Tensor,
    *,
    n_feasibility_steps: int | Tensor = 20,
    margin: float | Tensor = 0.0,
) -> SetRule:
    r"""Train one model for each preference vector, each in the sector where its own is nearest.

    Model `i` is to stay where $(u_j - u_i)^\top L_i \le 0$ for all `j`, with $u_j$ the preference
    vectors at unit length. Constraints that are violated are active, and their gradients are
    $J_i^\top (u_j - u_i)$. Until a model is in its sector for the first time, or its budget is
    spent, it follows the shortest convex combination of these; from then on, of these and of the
    gradients of its losses:

    $$d_i = J_i^\top \lambda_i, \qquad
    \lambda_i = \beta + \sum_{j\ \mathrm{active}} \gamma_j (u_j - u_i), \qquad
    (\beta, \gamma) \in \arg\min_{\Delta} \lVert d_i \rVert.$$

    The state holds the number of steps, and which models have begun the second stage. Without an
    active constraint it is `jd.mgda`. $\lambda_i$ may be negative. One quadratic program in
    `m + k` unknowns for each model, exact.

    Args:
        preferences: `(k, m)`, not negative; large where the loss may be large. A tensor may be
            vmapped. Models of equal preferences do not constrain each other.
        n_feasibility_steps: At most so many steps in the first stage. A tensor may be vmapped.
        margin: Constraints are active from so far inside of the sector, relative to the length of
            the losses. A tensor may be vmapped.

    Returns:
        The SetRule.

    Raises:
        ValueError: If the preferences are not one row for each model, or a number is negative.

    Differs from other implementations:
        The authors' code and libmoon restore weights for two objectives only; here for any number.
        Both clamp weights to 0.001 ... 0.999; here they reach 0 and 1.
        libmoon begins the second stage when all models are in their sectors at once; here each
        begins its own.

    References:
        X. Lin, H.-L. Zhen, Z. Li, Q. Zhang, S. Kwong, Pareto Multi-Task Learning, NeurIPS 2019,
        https://arxiv.org/abs/1912.12854

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.sets.pareto_mtl(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> gramians = torch.tensor([[18.0, -22.0], [-22.0, 38.0]]).expand(2, 2, 2)
        >>> rule.weighting(gramians, losses=torch.tensor([[1.0, 2.0], [1.0, 2.0]]))[0]
        tensor([[-0.2929,  0.7071],
                [ 0.6000,  0.4000]])
    """
    vectors = _check.preferences(preferences)
    _check.interval("n_feasibility_steps", n_feasibility_steps, 0)
    hyper = {
        "preferences": vectors,
        "n_feasibility_steps": n_feasibility_steps,
        "margin": _check.interval("margin", margin, 0),
    }
    return SetRule("pareto_mtl", _init, partial(_update, **hyper))
