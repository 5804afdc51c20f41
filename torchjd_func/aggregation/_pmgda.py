"""PMGDA: reach the preferred ray of the losses, then stay on it.

X. Zhang, X. Lin, Q. Zhang, PMGDA: A Preference-based Multiple Gradient Descent Algorithm,
arXiv:2402.09492.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _host, _present
from torchjd_func._lift import no_state, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, State, Weighting
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg import linear_program, min_norm_point
from torchjd_func.linalg._gramian import rank_tol

# A distance below this part of the length of the losses is rounding, and has no direction.
ON_THE_RAY = 1e-12


def _update(
    gramian: Tensor,
    state: State,
    losses: Tensor | None,
    *,
    preference: Vector,
    sigma: float | Tensor,
    h_tol: float | Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Correct the distance to the ray where it is too long, descend along the ray elsewhere."""
    _check.stateless("pmgda", state)
    values = _present.only(present, _check.losses_present("pmgda", losses))
    h, eta = _distance(values, resolve(preference, values, present))
    wide, tol = gramian.to(torch.float64), rank_tol(gramian)
    square = _square_of_slope(wide, eta, tol)
    correcting = (h > h_tol) & (square > 0)
    predicted = _predict(wide, eta, square, tol, present)
    return torch.where(correcting, _correct(wide, eta, sigma, present), predicted), state


def _square_of_slope(gramian: Tensor, eta: Tensor, tol: float) -> Tensor:
    """Return the squared length of the gradient of the distance; 0 if gradients cancel in it."""
    square = eta @ gramian @ eta
    return torch.where(square > tol * _largest_square(gramian, eta), square, 0.0)


def _largest_square(gramian: Tensor, eta: Tensor) -> Tensor:
    """Return what the squared length would be, did no gradient cancel another."""
    return (eta.abs() @ gramian.diagonal().sqrt()).square().detach()


def _distance(losses: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of the losses to the ray, and its derivative (0 on the ray)."""
    ray = preference / preference.norm()
    across = losses - (losses @ ray) * ray
    square = across @ across
    near = square <= (ON_THE_RAY**2) * (losses @ losses)
    h = torch.where(near, 1.0, square).sqrt()
    return torch.where(near, 0.0, h), torch.where(near, 0.0, across / h)


def _predict(
    gramian: Tensor, eta: Tensor, square: Tensor, tol: float, present: Tensor | None
) -> Tensor:
    """Find the shortest direction that leaves the distance as it is, to first order."""
    along = gramian @ eta
    inverse = torch.where(square > 0, 1 / torch.where(square > 0, square, 1.0), 0.0)
    rest = gramian - inverse * along.unsqueeze(-1) * along
    # Of a row along the gradient of the distance, rounding is left: no Gramian, until it is 0.
    rounding = 4 * tol * inverse * _largest_square(gramian, eta) * gramian.diagonal()
    left = rest.diagonal() > rounding
    rest = torch.where(left.unsqueeze(-1) & left, rest, 0.0)
    weights = min_norm_point(_present.apart(rest, present)).value
    return weights - inverse * (weights @ along) * eta


def _correct(gramian: Tensor, eta: Tensor, sigma: float | Tensor, present: Tensor | None) -> Tensor:
    """Maximise the least progress while the distance falls at the rate `sigma`.

    A linear program in the weights `(m + 1,)` of the unit rows of all gradients and of that of the
    distance, in slacks, and in the least progress, which may have any sign. An absent objective has
    a column of zeros, which is in no basis, and no progress is asked of it.

    Returns:
        The weights of the raw gradients, `(m,)`.
    """
    m = len(eta)
    mixing = torch.cat([torch.eye(m, dtype=eta.dtype, device=eta.device), eta.unsqueeze(0)])
    products = mixing @ gramian @ mixing.mT
    squares = products.diagonal()
    norms = torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
    inverse = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)
    cosines = products * inverse.unsqueeze(-1) * inverse
    progress = _present.only(present, _ratio_to_shortest(norms[:m]))
    ones = _present.only(present, torch.ones_like(eta))
    free = torch.cat([-progress, progress.new_zeros(2)]).unsqueeze(-1)
    slacks = torch.cat(
        [-torch.eye(m + 1, dtype=eta.dtype, device=eta.device), eta.new_zeros(1, m + 1)]
    )
    simplex = torch.cat([ones, ones.new_ones(1)]).unsqueeze(0)
    matrix = torch.cat([torch.cat([cosines, simplex]), slacks, free], dim=-1)
    rate = _host.number(sigma, eta).unsqueeze(-1)
    right = torch.cat([eta.new_zeros(m), rate, eta.new_ones(1)])
    objective = torch.cat([eta.new_zeros(2 * m + 2), eta.new_ones(1)])
    weights = linear_program(objective, matrix, right, n_free=1).value[: m + 1]
    return (weights * inverse) @ mixing


def _ratio_to_shortest(norms: Tensor) -> Tensor:
    """Return the shortest length (of those not 0) over each length; 1 where that is 0."""
    positive = norms > 0
    shortest = torch.where(positive, norms, torch.inf).amin()
    return torch.where(positive, shortest / torch.where(positive, norms, 1.0), 1.0)


def pmgda(
    preference: Numbers,
    *,
    sigma: float | Tensor = 0.1,
    h_tol: float | Tensor = 1e-3,
) -> Aggregator:
    r"""Bring the losses on the ray of a preference, and lower them along it.

    $h$ is the distance of the losses to the ray of $p$, $\eta = \partial h / \partial L$ and
    $g_h = J^\top \eta$. While $h > h_{tol}$, with $\hat R$ the unit rows of $g_1 \dots g_m, g_h$,

    $$\max_{\mu \in \Delta} \min_i g_i^\top \hat R^\top \mu \quad\text{s.t.}\quad
    g_h^\top \hat R^\top \mu \ge \sigma \lVert g_h \rVert;$$

    afterwards $\min_{\mu \in \Delta, \nu} \lVert J^\top \mu + \nu g_h \rVert$: MGDA on the
    gradients without their parts along $g_h$. Weights may be negative. Solves a linear program in
    `m + 2` unknowns and a quadratic one in `m`, exactly; the first on the host, so that a CUDA
    graph cannot capture it.

    Args:
        preference: `p`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; positive: losses are to be proportional to it.
            A tensor may be vmapped or changed without recompiling.
        sigma: Rate of correction, in `(0, 1]`.
        h_tol: Distance that is close enough, in units of the losses.

    Returns:
        The Aggregator, without state; it needs `losses=`.

    Raises:
        ValueError: If `preference` is not 1-D, not of the number of objectives, or not positive, a
            number is out of range, or the losses are missing.

    Differs from other implementations:
        libmoon descends by plain MGDA, which leaves the ray.
        libmoon adds 1e-4 to the lengths in the linear program, but not in the weights.

    References:
        X. Zhang, X. Lin, Q. Zhang, PMGDA: A Preference-based Multiple Gradient Descent Algorithm,
        2024, https://arxiv.org/abs/2402.09492

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> jd.pmgda([1.0, 1.0])(jac, losses=torch.tensor([1.0, 2.0]))[0]
        tensor([0.1000, 0.1957, 0.1957])
    """
    update = partial(
        _update,
        preference=_check.per_loss("preference", preference, low=0, open_low=True),
        sigma=_check.interval("sigma", sigma, 0, open_low=True),
        h_tol=_check.interval("h_tol", h_tol, 0),
    )
    return weighted(Weighting("pmgda", no_state, update, widen=False))
