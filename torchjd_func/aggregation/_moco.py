"""MoCo: stochastic multi-objective gradient correction.

H. Fernando, H. Shen, M. Liu, S. Chaudhury, K. Murugesan, T. Chen, Mitigating Gradient Bias in
Multi-objective Learning, ICLR 2023, arXiv:2210.12624.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._types import Aggregator, PyTree
from torchjd_func.aggregation import _rows
from torchjd_func.linalg import project_simplex

NAME = "moco"


class MoCoState(NamedTuple):
    """Running estimates of the gradients and of the min-norm weights."""

    tracked: PyTree  # like the Jacobian, in float32 or better
    weights: Tensor  # (m,) float64, on the simplex
    step: Tensor  # () int64


def _init(jac: PyTree, key: Tensor | None) -> MoCoState:
    """Start from zero estimates and uniform weights."""
    leaf, m = _tree.leaves(jac)[0], _tree.leading_size(jac)
    return MoCoState(
        _rows.zeros_like(jac),
        leaf.new_full((m,), 1 / max(m, 1), dtype=torch.float64),
        leaf.new_zeros((), dtype=torch.int64),
    )


def _update(
    jac: PyTree,
    state: MoCoState,
    losses: Tensor | None,
    *,
    beta: float | Tensor,
    gamma: float | Tensor,
    rho: float | Tensor,
    beta_sigma: float | Tensor,
    gamma_sigma: float | Tensor,
    simplex: str,
    prescale: bool,
    present: Tensor | None = None,
) -> tuple[PyTree, MoCoState]:
    """Track the gradients, then descend on the norm of their combination, then combine."""
    _check.state_type(NAME, state, MoCoState)
    _rows.check(NAME, "tracked", state.tracked, jac)
    _check.state(NAME, "weights", state.weights, (_tree.leading_size(jac),))
    step = state.step + 1
    t = step.to(torch.float64)
    scale = _scale(jac, losses) if prescale else None
    tracked = _rows.interpolate(state.tracked, jac, beta * t**-beta_sigma, scale)
    tracked = _present.renewed(present, tracked, state.tracked)

    current = _present.alone(present, state.weights)
    slope = _tree.gramian(tracked).to(torch.float64) @ current + rho * current
    moved = current - gamma * t**-gamma_sigma * slope
    moved = _present.only(present, moved, -torch.inf)
    weights = project_simplex(moved) if simplex == "projection" else torch.softmax(moved, dim=0)
    kept = _present.together(present, weights, state.weights)
    return _rows.combine(tracked, weights, jac), MoCoState(tracked, kept, step)


def _scale(jac: PyTree, losses: Tensor | None) -> Tensor:
    """Return `L_i / |g_i|`, 0 for a zero row, and not-a-number where the loss is negative."""
    values = _check.losses_present("moco(prescale=True)", losses).to(torch.float64)
    values, norms = torch.where(values >= 0, values, torch.nan), _rows.norms(jac)
    return torch.where(norms > 0, values / torch.where(norms > 0, norms, 1.0), 0.0)


def moco(
    beta: float | Tensor = 0.5,
    gamma: float | Tensor = 0.1,
    rho: float | Tensor = 0.0,
    *,
    beta_sigma: float | Tensor = 0.5,
    gamma_sigma: float | Tensor = 0.5,
    simplex: str = "projection",
    prescale: bool = False,
) -> Aggregator:
    r"""Step along tracked gradients, with weights that descend on the length of the step.

    $$Y \leftarrow Y - \beta_t (Y - J), \qquad
    \lambda \leftarrow \Pi_\Delta\big(\lambda - \gamma_t (Y Y^\top + \rho I) \lambda\big), \qquad
    d = Y^\top \lambda,$$

    with $\beta_t = \beta t^{-\sigma_\beta}$, $\gamma_t = \gamma t^{-\sigma_\gamma}$, $t$ from 1.
    Averaging over steps removes the bias that one noisy batch gives the min-norm weights. The state
    holds `Y`, of the size of the Jacobian, and $\lambda$. For a constant `J`, and a small enough
    $\gamma$, the weights tend to those of `jd.mgda`. A stable step is below
    $2 / \lambda_{\max}(Y Y^\top + \rho I)$, which depends on the scale of the gradients.

    Args:
        beta: Step of the tracked gradients.
        gamma: Step of the weights.
        rho: Ridge that pulls the weights towards uniform.
        beta_sigma: How fast `beta` decays.
        gamma_sigma: How fast `gamma` decays.
        simplex: How the weights return to the simplex, by `"projection"` or `"softmax"`.
        prescale: Whether to scale each gradient to the length of its loss first; needs `losses=`,
            which have to be positive: where one is negative, the result is not-a-number.

    Returns:
        The Aggregator, without weighting: `d` combines tracked, not present, gradients.

    Raises:
        ValueError: If an option is unknown or out of range, or losses are needed and missing.

    Differs from other implementations:
        LibMTL has `simplex="softmax"`, no projection, and `prescale=True` with 1e-8 added to norms.
        The paper also projects each tracked gradient on a ball; published code does not.

    References:
        H. Fernando et al., Mitigating Gradient Bias in Multi-objective Learning: A Provably
        Convergent Approach, ICLR 2023, https://arxiv.org/abs/2210.12624

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> jd.moco(gamma=0.01)(jac)[0]
        tensor([0.4375, 0.5000, 0.5000])
    """
    _check.flag("prescale", prescale)
    _check.choice("simplex", simplex, ("projection", "softmax"))
    options = {
        "beta": _check.interval("beta", beta, 0, 1),
        "gamma": _check.interval("gamma", gamma, 0),
        "rho": _check.interval("rho", rho, 0),
        "beta_sigma": _check.interval("beta_sigma", beta_sigma, 0),
        "gamma_sigma": _check.interval("gamma_sigma", gamma_sigma, 0),
    }
    update = partial(_update, simplex=simplex, prescale=prescale, **options)
    return Aggregator(NAME, _init, update)
