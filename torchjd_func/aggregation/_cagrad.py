"""CAGrad: conflict-averse gradient descent.

B. Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021,
arXiv:2110.14048.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host, _present
from torchjd_func._host import Array
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator
from torchjd_func.linalg._gramian import (
    Rows,
    pseudo_inverse,
    rank_tol,
    rows_of,
    squared_length,
)
from torchjd_func.linalg._nnqp import align, minimize, nearest

RESCALES = (None, "1+c^2", "1+c")
# Steps of the search for the worst improvement; 3 to 6 do as a rule.
STEPS = 16
# Added to cosines while searching, so that dependent rows share what they add.
RIDGE = 1e-11


def _weights(
    gramian: Tensor,
    *,
    c: float | Tensor,
    rescale: str | None,
    present: Tensor | None = None,
) -> Tensor:
    """Find the worst improvement by search, then the weights in closed form on their support."""
    combine, wide = partial(_combine, tol=rank_tol(gramian)), gramian.double()
    mask = () if present is None else (present,)
    shares = _present.uniform(present, wide)
    total = _host.call(combine, wide, shares, c.double() if isinstance(c, Tensor) else c, *mask)
    if rescale is None:
        return total
    return total / (1 + c * c if rescale == "1+c^2" else 1 + c)


def _combine(
    xp: Any,
    gramian: Array,
    shares: Array,
    c: float | Array,
    present: Array | None = None,
    *,
    tol: float,
) -> Array:
    """Add to the mean gradient what it lacks."""
    pushed = gramian @ shares  # improvements under the mean gradient
    square = pushed @ shares
    length = xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1.0)), 0.0)
    radius, rows = c * length, rows_of(gramian, xp)
    fixed = tuple(map(_host.constant, (gramian, pushed, radius)))
    if present is not None:
        fixed = _out_of_reach(xp, fixed, _host.constant(rows.norms), present)
    support, slack = _search(np, *fixed, tol=tol) if xp is np else search(*fixed, tol)
    return shares + _closed_form(xp, rows, pushed, radius, support, slack, tol)


def _out_of_reach(
    xp: Any, problem: tuple[Array, ...], norms: Array, present: Array
) -> tuple[Array, ...]:
    """Let absent objectives improve by more than any other can, and not stand in its way."""
    gramian, pushed, radius = problem
    high = xp.amax(pushed + radius * norms, -1)
    return _present.apart(gramian, present), xp.where(present, pushed, high), radius


@torch.library.custom_op("torchjd_func::cagrad", mutates_args=())
def search(gramian: Tensor, pushed: Tensor, radius: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Search for each problem of a batch; opaque to the compiler, since it ends early on the CPU.

    Args:
        gramian: `(..., m, m)` float64.
        pushed: `(..., m)` float64; as many leading dimensions, each equal or 1.
        radius: `(...,)` float64, likewise.
        tol: Share of the largest eigenvalue that is rounding.

    Returns:
        `support` `(..., m)` and `slack` `(...,)`, bool.
    """
    return _host.call(partial(_search, tol=tol), gramian, pushed, radius)


@search.register_fake
def _fake(gramian: Tensor, pushed: Tensor, radius: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes."""
    shape = torch.broadcast_shapes(pushed.shape[:-1], radius.shape)
    support = pushed.new_empty((*shape, pushed.shape[-1]), dtype=torch.bool)
    return support, support.new_empty(shape)


@search.register_vmap
def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    """Search in one larger batch."""
    return search(*align(in_dims, *args[:3]), args[3]), (0, 0)


def _search(
    xp: Any, gramian: Array, pushed: Array, radius: Array, *, tol: float
) -> tuple[Array, Array]:
    """Return the support of the addition, and whether the ball does not limit it."""
    rows = rows_of(gramian, xp)
    diagonal = gramian.diagonal(0, -2, -1)[..., None]
    ridged = gramian + max(tol, RIDGE) * diagonal * _host.identity(gramian)
    # Gradients that balance, up to rounding, cannot all improve; 0 is the most they all can.
    balance = xp.where(_pairs(rows.norms > 0), rows.cosines, 0.0)
    stationary = squared_length(balance, nearest(xp, balance).value) <= tol
    at_zero = _added(xp, ridged, pushed, 0.0 * radius)[1] <= radius * radius
    # A row alone would let the ball have that much.
    high = xp.amin(pushed + radius[..., None] * rows.norms, -1)
    low = xp.amin(pushed, -1)
    high = xp.where(stationary | ~at_zero, xp.clip(high, None, 0.0), high)
    low = xp.where(at_zero, xp.clip(low, 0.0, None), low)
    support = _largest_step(xp, ridged, pushed, radius, low, high)
    return support, stationary & at_zero


def _largest_step(
    xp: Any, gramian: Array, pushed: Array, radius: Array, low: Array, high: Array
) -> Array:
    """Return the support at the largest `nu` that the ball allows.

    The length of the addition is convex in `nu`, and its square is a parabola where the support
    does not change: go to where that meets the ball, or halve the bracket if it is outside.
    """
    nu, support = high, pushed < -xp.inf
    for step in range(STEPS):
        added, square = _added(xp, gramian, pushed, nu)
        previous, support = support, added > 0
        if xp is np and step and (support == previous).all():
            break
        excess = radius * radius - square
        low, high = xp.where(excess >= 0, nu, low), xp.where(excess >= 0, high, nu)
        slope = added.sum(-1)
        cut = xp.where(_pairs(support), gramian, _host.identity(gramian))
        bend = _solve(cut, xp.where(support, 1.0, 0 * added)).sum(-1)
        root = xp.sqrt(xp.clip(slope * slope + bend * excess, 0.0, None))
        met = nu + excess / xp.where(slope + root > 0, slope + root, 1.0)
        inside = (met >= low) & (met <= high) & (slope > 0)
        nu = xp.where(inside, met, 0.5 * (low + high))
    return support


def _pairs(chosen: Array) -> Array:
    """Say for each entry of a matrix whether its row and its column are chosen."""
    return chosen[..., :, None] & chosen[..., None, :]


def _added(xp: Any, gramian: Array, pushed: Array, nu: Array) -> tuple[Array, Array]:
    """Return the shortest `J'v, v >= 0` with `G (b + v) >= nu`, as `v` and its square."""
    added = minimize(xp, gramian, pushed - nu[..., None])
    return added, squared_length(gramian, added)


def _solve(matrix: Array, right: Array) -> Array:
    """Solve; a singular matrix gives numbers that are of no use, but does not raise."""
    if isinstance(matrix, Tensor):
        return torch.linalg.solve_ex(matrix, right)[0]
    try:
        return np.linalg.solve(matrix, right[..., None])[..., 0]
    except np.linalg.LinAlgError:  # of one in the batch
        return _solve(*map(torch.from_numpy, (matrix, right))).numpy()


def _closed_form(
    xp: Any, rows: Rows, pushed: Array, radius: Array, support: Array, slack: Array, tol: float
) -> Array:
    """Solve `G v = nu - G b` on the support, with the `nu` for which `J' v` has length `radius`."""
    cosines = xp.where(_pairs(support), rows.cosines, 0.0)
    cosines = cosines + xp.where(support, 0.0, _host.identity(cosines))
    inverse = pseudo_inverse(cosines, tol)
    used = xp.where(support, rows.inverse, 0.0)
    scaled = used * pushed
    p, q = inverse @ used, inverse @ scaled
    a_1, a_2, a_3 = used @ p, used @ q, scaled @ q - radius * radius
    found = a_1 > 0
    square = a_2 * a_2 - a_1 * a_3
    positive = found & (square > 0)
    root = xp.where(positive, xp.sqrt(xp.where(positive, square, 1.0)), 0.0)
    nu = xp.where(slack, 0.0, (a_2 + root) / xp.where(found, a_1, 1.0))
    return xp.clip((nu * p - q) * used, 0.0, None)


def cagrad(c: float | Tensor = 0.5, *, rescale: str | None = None) -> Aggregator:
    r"""Maximise the worst improvement in a ball around the mean gradient.

    With $g_0$ the mean gradient,
    $$\max_d \min_i g_i^\top d \quad \text{subject to} \quad
    \lVert d - g_0 \rVert \le c \lVert g_0 \rVert.$$

    For `c < 1` it converges to a minimum of the mean loss, and may conflict; for `c >= 1` it never
    conflicts. Where no direction improves all objectives (their gradients balance, or one is zero)
    several `d` are optimal: the one closest to $g_0$ is taken. Solves 5 to 10 quadratic programs in
    `m` unknowns (an accelerator 18, so that nothing waits for the host), then a closed form; exact
    to about 1e-8.

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
