"""GradVac: the gradient vaccine.

Z. Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
Multilingual Models, ICLR 2021, arXiv:2010.05874.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _host, _present, random
from torchjd_func._host import Array
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting
from torchjd_func.aggregation._orders import shuffled_others
from torchjd_func.aggregation._surgery import raise_cosines
from torchjd_func.linalg._gramian import rank_tol


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
    present: Tensor | None = None,
) -> tuple[Tensor, GradVacState]:
    """Draw orders, correct the gradients, and move the averages."""
    _check.state_type("gradvac", state, GradVacState)
    _check.state("gradvac", "phi", state.phi, gramian.shape)
    tol = rank_tol(gramian)
    next_key, draw = random.split(state.key)
    orders = shuffled_others(draw, gramian.shape[0])
    # A row of zeros adds nothing where it is visited.
    correct, launch = partial(_correct, tol=tol), partial(raise_cosines, tol=tol)
    weights, seen = _host.call(correct, gramian.double(), state.phi, orders, device=launch)
    phi = (1 - beta) * state.phi + beta * seen
    if present is not None:
        phi = torch.where(present & present.unsqueeze(-1), phi, state.phi)
    mean = reduction == "mean"
    weights = weights / _present.count(present, gramian) if mean else weights
    return weights, GradVacState(phi, next_key)


def _correct(
    xp: Any, gramian: Array, targets: Array, orders: Array, *, tol: float
) -> tuple[Array, Array]:
    """Correct every row, all rows at once, one step of their orders at a time.

    Returns:
        Weights, and the cosines that were seen.
    """
    squares, seen = gramian.diagonal(), targets
    norms = _root(xp, squares)
    inverse = xp.where(norms > 0, 1 / xp.where(norms > 0, norms, 1.0), 0.0)
    # Row i holds the coordinates of the corrected gradient of objective i.
    coordinates = _host.identity(gramian)
    one_hot = coordinates > 0
    for j in orders.T:
        visited = one_hot[j]
        square = ((coordinates @ gramian) * coordinates).sum(-1)
        # A corrected gradient may cancel to rounding, which has no direction.
        size = xp.abs(_host.constant(coordinates)) @ norms
        length = _root(xp, xp.where(square > tol * size * size, square, 0.0))
        inner = (coordinates * gramian[j]).sum(-1)
        phi = _cosine(xp, inner * inverse[j], length)
        target = xp.where(visited, targets, 0.0).sum(-1)
        added = length * inverse[j] * _correction(xp, phi, target)
        coordinates = coordinates + xp.where(visited, added[:, None], 0.0)
        seen = xp.where(visited, phi[:, None], seen)
    return coordinates.sum(0), seen


def _root(xp: Any, square: Array) -> Array:
    """Return the square root, with a derivative of 0 where the square is not positive."""
    return xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1.0)), 0.0)


def _cosine(xp: Any, inner: Array, length: Array) -> Array:
    """Return the cosine with a unit vector; 0 for a zero vector."""
    ratio = inner / xp.where(length > 0, length, 1.0)
    return xp.clip(xp.where(length > 0, ratio, 0.0), -1, 1)


def _correction(xp: Any, phi: Array, target: Array) -> Array:
    """Return how much of a unit vector raises the cosine `phi` of another one to `target`."""
    # A target of 1 is out of reach: its sine is kept above rounding.
    sine = _root(xp, xp.clip(1 - target * target, torch.finfo(torch.float64).eps, None))
    return xp.where(phi < target, target / sine * _root(xp, 1 - phi * phi) - phi, 0.0)


def gradvac(beta: float | Tensor = 0.5, *, reduction: str = "sum") -> Aggregator:
    r"""Add the gradients after raising low cosines between them to their running averages.

    Each gradient $x = g_i$ visits the others in a random order. With $\phi = \cos(x, g_j)$ and
    where $\phi < \hat\phi_{ij}$, it takes the step after which $\cos(x, g_j) = \hat\phi_{ij}$,
    $$x \leftarrow x + \frac{\lVert x \rVert (\hat\phi_{ij} \sqrt{1 - \phi^2} -
    \phi \sqrt{1 - \hat\phi_{ij}^2})}{\lVert g_j \rVert \sqrt{1 - \hat\phi_{ij}^2}} g_j,$$
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
