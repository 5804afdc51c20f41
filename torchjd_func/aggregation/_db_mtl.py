"""DB-MTL: dual balancing of losses and gradients.

B. Lin, W. Jiang, F. Ye, Y. Zhang, P. Chen, Y.-C. Chen, S. Liu, I. W. Tsang, J. T. Kwok,
Dual-Balancing for Multi-Task Learning, arXiv:2308.12029.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._types import Aggregator, PyTree
from torchjd_func.aggregation import _rows

NAME = "db_mtl"


class DBMTLState(NamedTuple):
    """Running averages of the gradients of the log losses."""

    averages: PyTree  # like the Jacobian, in float32 or better
    step: Tensor  # () int64


def _init(jac: PyTree, key: Tensor | None) -> DBMTLState:
    """Start from zero averages."""
    step = _tree.leaves(jac)[0].new_zeros((), dtype=torch.int64)
    return DBMTLState(_rows.zeros_like(jac), step)


def _update(
    jac: PyTree,
    state: DBMTLState,
    losses: Tensor | None,
    *,
    beta: float | Tensor,
    sigma: float | Tensor,
    eps: float | Tensor,
    present: Tensor | None = None,
) -> tuple[PyTree, DBMTLState]:
    """Average the gradients of the log losses, then bring all to the length of the longest."""
    _check.state_type(NAME, state, DBMTLState)
    _rows.check(NAME, "averages", state.averages, jac)
    values = _check.losses_present(NAME, losses).to(torch.float64)
    step = state.step + 1
    fresh = 1 - beta * step.to(torch.float64) ** -sigma
    averages = _rows.interpolate(state.averages, jac, fresh, _rows.slope_of_log(values + eps))
    averages = _present.renewed(present, averages, state.averages)

    norms = _present.only(present, _rows.norms(averages))
    lengths = norms + eps
    inverse = torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1.0), 0.0)
    weights = _present.only(present, norms.max() * inverse)
    return _rows.combine(averages, weights, jac), DBMTLState(averages, step)


def db_mtl(
    beta: float | Tensor = 0.9, *, sigma: float | Tensor = 0.0, eps: float | Tensor = 1e-8
) -> Aggregator:
    r"""Balance losses by their logarithm, and gradients by their length.

    $$\hat g_i \leftarrow \beta_k \hat g_i + (1 - \beta_k) \nabla \log(L_i + \epsilon), \qquad
    d = \max_i \lVert \hat g_i \rVert \sum_i \frac{\hat g_i}{\lVert \hat g_i \rVert + \epsilon},$$

    with $\beta_k = \beta k^{-\sigma}$, $k$ from 1. Losses have to be positive: where one is not,
    the result is not-a-number. The scale of a loss does not matter, up to $\epsilon$. The state
    holds the averages, of the size of the Jacobian; they start at zero and are not corrected for
    it, so that the first steps are short. What is handed in are gradients of the losses, not of
    their logarithms. May conflict with objectives.

    Args:
        beta: Share of the past in the averages.
        sigma: How fast `beta` decays.
        eps: Added to losses and to lengths, as in the paper; with 0 the method is scale-free.

    Returns:
        The Aggregator, without weighting: `d` combines averaged, not present, gradients.

    Raises:
        ValueError: If the losses are missing, or a number is out of range.

    Differs from other implementations:
        The paper and LibMTL train the heads on the log losses too; a head of `jd.multitask` gets
        the plain gradient of its loss.

    References:
        B. Lin et al., Dual-Balancing for Multi-Task Learning, 2023,
        https://arxiv.org/abs/2308.12029

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> jd.db_mtl(beta=0.0)(jac, losses=torch.tensor([1.0, 2.0]))[0]
        tensor([0.1295, 1.6882, 1.6882])
    """
    options = {
        "beta": _check.interval("beta", beta, 0, 1),
        "sigma": _check.interval("sigma", sigma, 0),
        "eps": _check.interval("eps", eps, 0),
    }
    return Aggregator(NAME, _init, partial(_update, **options))
