"""GradVac: the gradient vaccine.

Z. Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
Multilingual Models, ICLR 2021, arXiv:2010.05874.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, random
from torchjd_func._types import Aggregator, Weighting, weighted
from torchjd_func.aggregation._orders import one_hot, shuffled_others
from torchjd_func.aggregation._rows import safe_sqrt
from torchjd_func.linalg._gramian import rank_tol, rows_of


class GradVacState(NamedTuple):
    """The cosines that are aimed at, and the source of the orders."""

    phi: Tensor  # (m, m) float64; entry (i, j) is for row i against row j
    key: Tensor  # (2,)


def _init(statistic: Tensor, key: Tensor | None) -> GradVacState:
    """Aim at cosine 0, as PCGrad does."""
    phi = statistic.new_zeros(statistic.shape, dtype=torch.float64)
    return GradVacState(phi, _check.key_present("gradvac", key))


def _update(
    gramian: Tensor,
    state: GradVacState,
    losses: Tensor | None,
    *,
    beta: float | Tensor,
    reduction: str,
) -> tuple[Tensor, GradVacState]:
    """Correct every row, all rows at once, one step of their orders at a time."""
    _check.state_type("gradvac", state, GradVacState)
    _check.state("gradvac", "phi", state.phi, gramian.shape)
    m, tol = gramian.shape[0], rank_tol(gramian)
    gramian = gramian.to(torch.float64)
    next_key, draw = random.split(state.key)
    # Row i holds the coordinates of the corrected gradient of objective i.
    coordinates = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
    rows, seen = rows_of(gramian), state.phi
    for j in shuffled_others(draw, m).unbind(-1):
        visited = one_hot(j, m)
        square = ((coordinates @ gramian) * coordinates).sum(-1)
        # A corrected gradient may cancel to rounding, which has no direction.
        size = coordinates.detach().abs() @ rows.norms
        length = safe_sqrt(torch.where(square > tol * size.square(), square, 0.0))
        inner = (coordinates * gramian[j]).sum(-1)
        phi = _cosine(inner * rows.inverse[j], length)
        target = torch.where(visited, state.phi, 0.0).sum(-1)
        added = length * rows.inverse[j] * _correction(phi, target)
        coordinates = coordinates + torch.where(visited, added.unsqueeze(-1), 0.0)
        seen = torch.where(visited, phi.unsqueeze(-1), seen)
    weights = coordinates.sum(0) if reduction == "sum" else coordinates.mean(0)
    return weights, GradVacState((1 - beta) * state.phi + beta * seen, next_key)


def _cosine(inner: Tensor, length: Tensor) -> Tensor:
    """Return the cosine with a unit vector; 0 for a zero vector."""
    ratio = inner / torch.where(length > 0, length, 1.0)
    return torch.where(length > 0, ratio, 0.0).clamp(-1, 1)


def _correction(phi: Tensor, target: Tensor) -> Tensor:
    """Return how much of a unit vector raises the cosine `phi` of another one to `target`."""
    # A target of 1 is out of reach: its sine is kept above rounding.
    sine = safe_sqrt((1 - target.square()).clamp(min=torch.finfo(phi.dtype).eps))
    return torch.where(phi < target, target / sine * safe_sqrt(1 - phi.square()) - phi, 0.0)


def gradvac(beta: float | Tensor = 0.5, *, reduction: str = "sum") -> Aggregator:
    r"""Add the gradients after raising low cosines between them to their running averages.

    Each gradient $x = g_i$ visits the others in a random order. With $\phi = \cos(x, g_j)$ and
    where $\phi < \hat\phi_{ij}$, it takes the step after which $\cos(x, g_j) = \hat\phi_{ij}$,
    $$x \leftarrow x + \frac{\lVert x \rVert (\hat\phi_{ij} \sqrt{1 - \phi^2}
    - \phi \sqrt{1 - \hat\phi_{ij}^2})}{\lVert g_j \rVert \sqrt{1 - \hat\phi_{ij}^2}} g_j,$$
    and in any case $\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi$.

    The state holds the averages, at first 0, so that the first call is PCGrad, and the key. The
    result is linear in the scale of each gradient at a fixed state, and may conflict. Takes `m - 1`
    steps on an `(m, m)` matrix. One state for each group of parameters: `jd.grouped`.

    Args:
        beta: Rate of the averages, in `[0, 1]`. A tensor may be vmapped.
        reduction: `"sum"` of the corrected gradients, as in the paper, or their `"mean"`.

    Returns:
        The Aggregator; `init` needs a key.

    Raises:
        ValueError: If an option is out of range, or `init` is given no key.

    Differs from other implementations:
        TorchJD and LibMTL add 1e-8 to denominators, which matters for small gradients.
        SamsungLabs updates the averages only where a gradient is corrected.

    References:
        Z. Wang, Y. Tsvetkov, O. Firat, Y. Cao, Gradient Vaccine: Investigating and Improving
        Multi-task Optimization in Massively Multilingual Models, ICLR 2021,
        https://arxiv.org/abs/2010.05874

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> aggregator = jd.gradvac()
        >>> _, state = aggregator(jac, aggregator.init(jac, key=jd.random.key(0)))
        >>> aggregator.weighting(jac @ jac.T, state)[0]
        tensor([1.8580, 1.4064])
    """
    options = {"beta": _check.interval("beta", beta, 0, 1), "reduction": reduction}
    _check.choice("reduction", reduction, ("sum", "mean"))
    return weighted(Weighting("gradvac", _init, partial(_update, **options), widen=False))
