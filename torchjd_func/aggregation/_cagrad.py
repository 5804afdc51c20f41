"""CAGrad: conflict-averse gradient descent.

B. Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021,
arXiv:2110.14048.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Aggregator, stateless, weighted
from torchjd_func.linalg import min_norm_point, nnqp
from torchjd_func.linalg._gramian import Rows, pseudo_inverse, rank_tol, rows_of

RESCALES = (None, "1+c^2", "1+c")
# Each round cuts the bracket of the worst improvement into 33: to 1e-9 of its width in all.
ROUNDS, POINTS = 6, 32
# Added to cosines while searching, so that dependent rows share what they add.
RIDGE = 1e-11


def _weights(gramian: Tensor, *, c: float | Tensor, rescale: str | None) -> Tensor:
    """Find the worst improvement by search, then the weights in closed form on their support."""
    m, tol = gramian.shape[0], rank_tol(gramian)
    gramian = gramian.to(torch.float64)
    mean = gramian.new_full((m,), 1 / max(m, 1))
    pushed = gramian @ mean  # improvements under the mean gradient
    square = (mean @ pushed).clamp(min=0)
    length = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
    radius = c * length
    rows = rows_of(gramian)
    support, slack = _search(
        gramian.detach(), pushed.detach(), length.detach(), radius.detach(), tol
    )
    total = mean + _closed_form(rows, pushed, radius, support, slack, tol)
    if rescale is None:
        return total
    return total / (1 + c * c if rescale == "1+c^2" else 1 + c)


def _search(
    gramian: Tensor, pushed: Tensor, length: Tensor, radius: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Return the support of the addition, and whether the ball does not limit it."""
    rows = rows_of(gramian)
    ridged = gramian + torch.diag_embed(max(tol, RIDGE) * gramian.diagonal())
    low, high = pushed.amin(), rows.norms.amin() * (length + radius)
    # Gradients that balance, up to rounding, cannot all improve; 0 is the most they all can.
    balance = rows.cosines * torch.outer(rows.norms > 0, rows.norms > 0)
    weights = min_norm_point(balance).value
    stationary = weights @ balance @ weights <= tol
    at_zero = _fits(ridged, pushed, radius, torch.zeros_like(low))
    high = torch.where(stationary | ~at_zero, high.clamp(max=0), high)
    low = torch.where(at_zero, low.clamp(min=0), low)
    # The length of the addition grows with `nu`: enclose the largest `nu` that the ball allows.
    share = torch.arange(1, POINTS + 1, dtype=low.dtype, device=low.device) / (POINTS + 1)
    for _ in range(ROUNDS):
        width = high - low
        fits = _fits(ridged, pushed, radius, low + width * share)
        passed = fits.to(low.dtype).cumprod(0).sum() / (POINTS + 1)
        low, high = low + width * passed, low + width * (passed + 1 / (POINTS + 1))
    return nnqp(ridged, pushed - low).value > 0, stationary & at_zero


def _fits(gramian: Tensor, pushed: Tensor, radius: Tensor, nu: Tensor) -> Tensor:
    """Say for each `nu` whether all can improve by it in the ball."""
    # The shortest J'v, v >= 0, with G (b + v) >= nu.
    added = nnqp(gramian, pushed - nu.unsqueeze(-1)).value
    return ((added @ gramian) * added).sum(-1) <= radius.square()


def _closed_form(
    rows: Rows, pushed: Tensor, radius: Tensor, support: Tensor, slack: Tensor, tol: float
) -> Tensor:
    """Solve `G v = nu - G b` on the support, with the `nu` for which `J' v` has length `radius`."""
    cosines = torch.where(torch.outer(support, support), rows.cosines, 0.0)
    inverse = pseudo_inverse(cosines + torch.diag_embed((~support).to(cosines.dtype)), tol)
    used = torch.where(support, rows.inverse, 0.0)
    scaled = used * pushed
    p, q = inverse @ used, inverse @ scaled
    a_1, a_2, a_3 = used @ p, used @ q, scaled @ q - radius.square()
    found = a_1 > 0
    root = a_2.square() - a_1 * a_3
    positive = found & (root > 0)
    root = torch.where(positive, torch.where(positive, root, 1.0).sqrt(), 0.0)
    nu = torch.where(slack, 0.0, (a_2 + root) / torch.where(found, a_1, 1.0))
    return ((nu * p - q) * used).clamp(min=0)


def cagrad(c: float | Tensor = 0.5, *, rescale: str | None = None) -> Aggregator:
    r"""Maximise the worst improvement in a ball around the mean gradient.

    With $g_0$ the mean gradient,
    $$\max_d \min_i g_i^\top d \quad \text{subject to} \quad
    \lVert d - g_0 \rVert \le c \lVert g_0 \rVert.$$

    For `c < 1` it converges to a minimum of the mean loss, and may conflict; for `c >= 1` it never
    conflicts. Where no direction improves all objectives (their gradients balance, or one is zero)
    several `d` are optimal: the one closest to $g_0$ is taken. Solves about 200 quadratic programs
    in `m` unknowns in 9 batches, then a closed form; exact to about 1e-8.

    Args:
        c: Radius of the ball, relative to $\lVert g_0 \rVert$, at least 0. A tensor may be vmapped
            or changed without recompiling.
        rescale: Divide the result by `"1+c^2"`, as the authors' experiments do, or by `"1+c"`, as
            their toy example; `None`, nothing, as in the paper.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `c` is negative or `rescale` is unknown.

    Differs from other implementations:
        TorchJD returns zero where gradients balance, one is zero, or all are small.
        LibMTL divides by `1 + c^2` unless told otherwise; the authors also multiply by `m`.

    References:
        B. Liu, X. Liu, X. Jin, P. Stone, Q. Liu, Conflict-Averse Gradient Descent for Multi-task
        Learning, NeurIPS 2021, https://arxiv.org/abs/2110.14048

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.cagrad(0.5)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.1835, 1.2041, 1.2041])
    """
    _check.choice("rescale", rescale, RESCALES)
    options = {"c": _check.interval("c", c, 0), "rescale": rescale}
    return weighted(stateless("cagrad", partial(_weights, **options), widen=False))
