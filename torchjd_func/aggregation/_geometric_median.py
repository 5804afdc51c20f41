"""The geometric median: the point whose distances to all gradients add up to the least.

K. Pillutla, S. M. Kakade, Z. Harchaoui, Robust Aggregation for Federated Learning, IEEE
Transactions on Signal Processing 70, 2022, arXiv:1912.13445.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg._dense import ORDERS, solve
from torchjd_func.linalg._gramian import rank_tol

MAX_ITER, TOL = 20, 1e-12
SOLVED = 1e-6  # largest last steps at a solution, of which Newton's alone may be rounding
LENGTHS = tuple(2.0**k for k in range(8))  # Newton's step is tried shorter, Weiszfeld's longer
DAMPING = 1 - 1e-12  # keeps a system regular where all gradients are on one line


class Start(NamedTuple):
    """What the distances between rows say."""

    medians: Array  # (m,), 1 at each row that is a median, else 0
    origin: Array  # (m,), 1 at the row of the smallest sum of distances, else 0
    weights: Array  # (m,), of a point below all rows, if none is a median


class Steps(NamedTuple):
    """Where to go from a point."""

    distances: Array  # (m,), to the rows
    newton: Array  # (m,), change of the weights
    weiszfeld: Array  # (m,), the same, always downhill


def _weights(
    gramian: Tensor, *, preference: Vector | None, present: Tensor | None = None
) -> Tensor:
    """Find the weights of the median."""
    wide = gramian.double()
    find = partial(_median, tol=rank_tol(gramian))
    mask = () if present is None else (present,)
    return _host.call_there_and_back(find, wide, resolve(preference, wide, present), *mask)


def _median(
    xp: Any, gramian: Array, shares: Array, present: Array | None = None, *, tol: float
) -> Array:
    """Take the rows that are medians; else go down from the best row, and refine with Newton."""
    sound = xp.isfinite(gramian.diagonal())
    if present is not None:
        sound = sound & present
    gramian = xp.where(sound[:, None] & sound, gramian, 0.0)
    shares = xp.where(sound, shares, 0.0)
    fixed = _host.constant(shares)
    medians, origin, point = _start(xp, _host.constant(gramian), fixed, sound, tol)
    found = medians.sum() > 0
    if xp is np and found:
        return medians / medians.sum()
    # Distances are measured from a row that is one of the many: outliers cost no accuracy.
    near = _centred(xp.where(found, _host.identity(gramian), gramian), origin)
    known = _host.constant(near)
    for _ in range(MAX_ITER):
        steps = _steps(xp, known, fixed, point)
        point = point + _best(xp, known, fixed, point, steps)
        if xp is np and abs(steps.newton).sum() <= TOL:
            break
    # At the minimum each further step of Newton has one more derivative of the minimum.
    steps = _steps(xp, near, shares, point)
    for _ in range(ORDERS - 1):
        point = point + steps.newton
        steps = _steps(xp, near, shares, point)
    refined = point + steps.newton
    left = abs(_host.constant(steps.newton)) + abs(_host.constant(steps.weiszfeld))
    solved = left.sum() <= SOLVED
    refined = xp.where(solved, refined, xp.nan)
    return xp.where(found, medians / xp.where(found, medians.sum(), 1.0), refined)


def _start(xp: Any, gramian: Array, shares: Array, sound: Array, tol: float) -> Start:
    """Test each row by the pull of the others, and leave the best row towards them."""
    # Vardi and Zhang: a row is a median if the pull, a sum of vectors of the lengths `shares`, is
    # no longer than its own share; else their step from it leads down.
    identity, squares = _host.identity(gramian), gramian.diagonal()
    sums = squares[:, None] + squares
    squared = sums - 2 * gramian
    same = squared <= tol * sums
    distances = xp.where(same, 0.0, xp.sqrt(xp.where(same, 1.0, squared)))
    pulls = xp.where(same, 0.0, shares / xp.where(same, 1.0, distances))
    totals = pulls.sum(-1)
    vectors = totals[:, None] * identity - pulls
    pull = xp.sqrt(xp.clip(((vectors @ gramian) * vectors).sum(-1), 0.0, None))
    own = xp.where(same, shares, 0.0).sum(-1)
    medians = sound & (pull <= own * (1 + tol**0.5))  # the square of `pull` is rounded
    sums = xp.where(sound, (shares * distances).sum(-1), xp.inf)
    origin = identity[_host.argsort(sums)[:1]][0]
    stays = xp.where(medians, 1.0, own / xp.where(medians, 1.0, pull)) @ origin
    toward = (origin @ pulls) / xp.where(stays < 1, origin @ totals, 1.0)
    weights = stays * origin + (1 - stays) * toward
    return Start(xp.where(medians, 1.0, 0 * own), origin, weights)


def _centred(gramian: Array, origin: Array) -> Array:
    """Return the Gramian of the rows less the one at `origin`."""
    row = origin @ gramian
    return gramian - row - row[:, None] + origin @ row


def _steps(xp: Any, gramian: Array, shares: Array, point: Array) -> Steps:
    """Return both steps from a point; Weiszfeld's is Newton's with the curvature rounded up."""
    identity, pushed = _host.identity(gramian), gramian @ point
    squares = point @ pushed - 2 * pushed + gramian.diagonal()
    distances = xp.sqrt(xp.where(squares > 0, squares, 1.0))
    total = (shares / distances).sum()
    surplus = shares - total * point * distances
    # Unknowns and equations are in units of the distances, which may differ by any factor.
    away = (point - identity) / distances[:, None]
    bent = (away * distances).T @ ((away @ (gramian / distances)) * (shares / distances)[:, None])
    system = total * identity - DAMPING * bent
    newton = solve(system, surplus)
    return Steps(distances, newton / distances, surplus / (total * distances))


def _best(xp: Any, gramian: Array, shares: Array, point: Array, steps: Steps) -> Array:
    """Return the multiple of a step that leads down most."""
    shorter, longer = [steps.newton / x for x in LENGTHS], [steps.weiszfeld * x for x in LENGTHS]
    tried = xp.stack([*shorter, *longer])
    pushed = tried @ gramian
    squares = ((tried * pushed).sum(-1) + 2 * (pushed @ point))[:, None] - 2 * pushed
    after = xp.sqrt(xp.clip(steps.distances**2 + squares, 0.0, None))
    # The difference of sums of distances, without a difference of distances.
    changes = (squares / (steps.distances + after)) @ shares
    return tried[_host.argsort(changes)[:1]][0]


def geometric_median(preference: Numbers | None = None) -> Aggregator:
    r"""Step along the point that is closest to all gradients, by the sum of distances.

    $$d = \arg\min_z \sum_i b_i \lVert z - g_i \rVert.$$

    Resists arbitrary rows, of faulty workers say, as long as those of more than half of the
    preference are sound: with a share $\alpha < 1/2$ of arbitrary rows,
    $\lVert d \rVert \le \frac{2 - 2 \alpha}{1 - 2 \alpha} \max \lVert g_i \rVert$ over the sound
    ones. Not a multi-task method: it may conflict. A convex combination of the rows, found by
    Weiszfeld's iteration with steps of Newton, exactly. Where several points are minimal (on a
    line, between the two rows in the middle), their mean over rows.

    Args:
        preference: `b`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; positive, such as each worker's share of the
            data; uniform weights `1/m` by default. A tensor may be vmapped or changed without
            recompiling.

    Returns:
        The Aggregator, without state. A row whose square is not finite gets the weight 0, and
        `jd.distributed.across_workers` leaves it out; in one process zero times NaN is NaN.
        Weights are not-a-number where the iteration does not converge, seen where rows that are
        not a median differ in length by more than 20 decades.

    Raises:
        ValueError: If `preference` is not 1-D, not of the number of objectives, or negative.

    Differs from other implementations:
        The paper smooths distances below 1e-6 and takes a few steps; here the minimum is exact, and
        a row may be the median (Vardi and Zhang).

    References:
        K. Pillutla, S. M. Kakade, Z. Harchaoui, Robust Aggregation for Federated Learning, IEEE
        Transactions on Signal Processing 70, 2022, https://arxiv.org/abs/1912.13445. Iteration:
        E. Weiszfeld, Tohoku Mathematical Journal 43, 1937. At a row: Y. Vardi, C.-H. Zhang, The
        multivariate L1-median and associated data depth, PNAS 97, 2000. Bound: H. P. Lopuhaa,
        P. J. Rousseeuw, Annals of Statistics 19, 1991

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [-1e6, -1e6]])
        >>> jd.geometric_median()(jac)[0].round(decimals=4).abs()
        tensor([0., 0.])
    """
    options = {"preference": _check.preference(preference)}
    weights_fn = partial(_weights, **options)
    return weighted(stateless("geometric_median", weights_fn, widen=False, robust=True))
