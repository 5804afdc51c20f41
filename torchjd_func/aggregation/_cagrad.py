"""CAGrad: conflict-averse gradient descent.

B. Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021,
arXiv:2110.14048.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _host, _present, _sound, _tree
from torchjd_func._lift import no_state, stateless
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, PyTree, State
from torchjd_func.aggregation._cagrad_search import find
from torchjd_func.aggregation._preference import resolve
from torchjd_func.aggregation._rows import safe_sqrt
from torchjd_func.linalg._gramian import pseudo_inverse, rank_tol, rows_of
from torchjd_func.linalg._nnqp import products_with, ridge_of

RESCALES = (None, "1+c^2", "1+c")
# Improvements of a gradient are told apart relative to its length, and to the mean length.
TIED = 1e-12


def _update(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    *,
    c: float | Tensor,
    preference: Vector | None,
    rescale: str | None,
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Measure what may be added on the rows: squares of short vectors are rounding."""
    _check.stateless("cagrad", state)
    gramian = _sound.without_subnormal(_tree.gramian(jac))
    shares = _shares(preference, gramian, present)
    additions = _additions(gramian, shares, c)
    vectors = _tree.row_sums(jac, torch.cat([additions, shares.unsqueeze(0)]))
    products = _tree.cross_gramian(vectors, jac)
    lengths = safe_sqrt(_tree.squared_norms(vectors))
    weights = _total(gramian, shares, c * lengths[-1], additions, products[:-1], lengths[:-1])
    return _tree.weighted_sum(jac, _rescaled(weights, c, rescale)), state


def _weights(
    gramian: Tensor,
    *,
    c: float | Tensor,
    preference: Vector | None,
    rescale: str | None,
    present: Tensor | None = None,
) -> Tensor:
    """Find what may be added to the mean gradient, and add the better."""
    wide = gramian.double()
    shares = _shares(preference, wide, present)
    additions = _additions(gramian, shares, c)
    products = additions @ wide.detach()
    # Rounding may only make an addition seem longer, and the ball smaller, so that it stays in it.
    norms, tol = safe_sqrt(wide.detach().diagonal()), rank_tol(gramian)
    squares = torch.maximum((products * additions).sum(-1), tol * (additions @ norms).square())
    mean = shares @ wide @ shares - tol * (shares.detach() @ norms).square()
    weights = _total(gramian, shares, c * safe_sqrt(mean), additions, products, safe_sqrt(squares))
    return _rescaled(weights, c, rescale)


def _shares(preference: Vector | None, like: Tensor, present: Tensor | None) -> Tensor:
    """Return the weights of the mean gradient `(m,)`: 0 where absent, and nowhere else."""
    shares = resolve(preference, like, present)
    if preference is None:
        return shares
    least = shares.clamp(min=torch.finfo(shares.dtype).tiny)
    return _present.only(present, least)


def _rescaled(weights: Tensor, c: float | Tensor, rescale: str | None) -> Tensor:
    """Divide as other implementations do."""
    if rescale is None:
        return weights
    return weights / (1 + c * c if rescale == "1+c^2" else 1 + c)


def _additions(gramian: Tensor, shares: Tensor, c: float | Tensor) -> Tensor:
    """Return two candidates `(2, m)` as constants, see `_cagrad_search`."""
    wide = gramian.detach().double()
    radius = _host.number(c, wide).detach()
    pushed = products_with(wide, shares, torch.finfo(gramian.dtype).eps)
    return find(wide, shares.detach(), pushed.detach(), radius, ridge_of(gramian))


def _total(
    gramian: Tensor,
    shares: Tensor,
    radius: Tensor,
    additions: Tensor,
    products: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Add the candidate of the better worst improvement, as far as the ball allows.

    Args:
        gramian: `(m, m)`.
        shares: `(m,)`, the weights of the mean gradient; 0 where a row is absent.
        radius: `()`, of the ball.
        additions: `(2, m)`, the candidates.
        products: `(2, m)`, their inner products with the rows.
        lengths: `(2,)`, their lengths.

    Returns:
        The weights `(m,)` of mean gradient and addition.
    """
    wide = gramian.double()
    pushed = wide @ shares  # improvements under the mean gradient
    reach = (radius / lengths.masked_fill(lengths <= 0, torch.inf)).detach()
    steps = torch.stack([reach[0], reach[1].clamp(max=1)]).unsqueeze(-1)
    steepest, closest = additions * steps
    norms = safe_sqrt(wide.diagonal()).detach()
    equal = TIED * (norms @ shares) * norms
    gains = torch.addcmul(pushed, products, steps).detach()
    absent = shares <= 0
    gain, other = (
        x.masked_fill(absent, torch.inf).amin() for x in (gains[0] - equal, gains[1] + equal)
    )
    better = ~(other >= gain)
    added = torch.where(better, steepest, closest)
    if not _host.unwatched(wide, radius):
        slack = ~better & (reach[1] >= 1)
        added = added + _derivative(wide, pushed, radius, added > 0, slack, rank_tol(gramian))
    return shares + added


def _derivative(
    gramian: Tensor, pushed: Tensor, radius: Tensor, support: Tensor, slack: Tensor, tol: float
) -> Tensor:
    """Return 0 with the derivative of the addition.

    On its support `G v = nu - G b`, with the `nu` for which `J'v` has length `radius`; 0 where the
    ball does not limit it.
    """
    rows = rows_of(gramian)
    identity = torch.eye(len(pushed), dtype=pushed.dtype, device=pushed.device)
    both = support.unsqueeze(-1) & support
    inverse = pseudo_inverse(torch.where(both, rows.cosines, identity), tol)
    used = torch.where(support, rows.inverse, 0.0)
    scaled = used * pushed
    p, q = inverse @ used, inverse @ scaled
    a_1, a_2, a_3 = used @ p, used @ q, scaled @ q - radius * radius
    positive = a_1 > 0
    root = safe_sqrt(torch.where(positive, a_2 * a_2 - a_1 * a_3, 0.0))
    nu = torch.where(slack, 0.0, (a_2 + root) / torch.where(positive, a_1, 1.0))
    value = (nu * p - q) * used
    return torch.nan_to_num(value - value.detach(), 0.0, 0.0, 0.0)


def cagrad(
    c: float | Tensor = 0.5, *, preference: Numbers | None = None, rescale: str | None = None
) -> Aggregator:
    r"""Maximise the worst improvement in a ball around the mean gradient.

    With $g_0 = \sum_i b_i g_i$ the mean gradient,
    $$\max_d \min_i g_i^\top d \quad \text{subject to} \quad
    \lVert d - g_0 \rVert \le c \lVert g_0 \rVert.$$

    For `c < 1` it converges to a minimum of the mean loss, and may conflict; for `c >= 1` it never
    conflicts. Where no direction improves all objectives (their gradients balance, or one is zero)
    several `d` are optimal: the one closest to $g_0$ is taken. Always in the ball. Solves about 10
    quadratic programs in `m` unknowns; given rows, lengths and improvements are taken from these,
    not from the Gramian, so that it is exact to 1e-6 also where gradients nearly balance.

    Args:
        c: Radius of the ball, relative to $\lVert g_0 \rVert$, at least 0. A tensor may be vmapped
            or changed without recompiling.
        preference: `b`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; uniform weights `1/m` by default. All
            objectives count for the worst improvement, also those with a 0.
        rescale: Divide the result by `"1+c^2"`, as the authors' experiments do, or by `"1+c"`, as
            their toy example; `None`, nothing, as in the paper.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `c` is negative, `rescale` is unknown, or `preference` is not 1-D, not of
            the number of objectives, or negative.

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
    options = {
        "c": _check.interval("c", c, 0),
        "preference": _check.preference(preference),
        "rescale": rescale,
    }
    weighting = stateless("cagrad", partial(_weights, **options), widen=False)
    return Aggregator("cagrad", no_state, partial(_update, **options), weighting)
