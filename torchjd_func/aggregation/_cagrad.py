"""CAGrad: conflict-averse gradient descent.

B. Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021,
arXiv:2110.14048.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host, _present, _tree
from torchjd_func._host import Array
from torchjd_func._lift import no_state, stateless
from torchjd_func._types import Aggregator, PyTree, State
from torchjd_func.aggregation._rows import safe_sqrt
from torchjd_func.linalg._gramian import pseudo_inverse, rank_tol, rows_of
from torchjd_func.linalg._nnqp import products_with, ridge_of
from torchjd_func.linalg._search import align, nearest_on_host, on_host

RESCALES = (None, "1+c^2", "1+c")
# Steps of the search for the length of the addition (5 to 10 do); the shortest, over the root of
# the ridge; and its relative error, at which a step that does not halve it is the last.
STEPS, SHORTEST, LENGTH_TOL = 60, 0.3, 1e-9
# Improvements of a gradient are told apart relative to its length, and to the mean length.
TIED = 1e-12
TINY = np.finfo(np.float64).tiny  # logarithms are not taken of less


class Rows(NamedTuple):
    """What the search knows of the rows; the longest has length 1."""

    gramian: Array  # (..., m, m)
    far: Array  # (..., m, m), keeps absent rows from being near
    pushed: Array  # (..., m), improvements under the mean gradient
    square: Array  # (...,), its squared length


def _update(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    *,
    c: float | Tensor,
    rescale: str | None,
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Measure what may be added on the rows: squares of short vectors are rounding."""
    _check.stateless("cagrad", state)
    gramian = _tree.gramian(jac)
    shares = _present.uniform(present, gramian)
    additions = _additions(gramian, shares, c)
    vectors = _tree.row_sums(jac, additions)
    products = _tree.cross_gramian(vectors, jac)
    lengths = safe_sqrt(_tree.gramian(vectors).diagonal())
    weights = _total(gramian, shares, c, additions, products, lengths)
    return _tree.weighted_sum(jac, _rescaled(weights, c, rescale)), state


def _weights(
    gramian: Tensor,
    *,
    c: float | Tensor,
    rescale: str | None,
    present: Tensor | None = None,
) -> Tensor:
    """Find what may be added to the mean gradient, and add the better."""
    wide = gramian.double()
    shares = _present.uniform(present, wide)
    additions = _additions(gramian, shares, c)
    products = additions @ wide.detach()
    # Rounding may only make an addition seem longer, so that it stays in the ball.
    longest = (additions @ safe_sqrt(wide.detach().diagonal())).square()
    squares = torch.maximum((products * additions).sum(-1), rank_tol(gramian) * longest)
    weights = _total(gramian, shares, c, additions, products, safe_sqrt(squares))
    return _rescaled(weights, c, rescale)


def _rescaled(weights: Tensor, c: float | Tensor, rescale: str | None) -> Tensor:
    """Divide as other implementations do."""
    if rescale is None:
        return weights
    return weights / (1 + c * c if rescale == "1+c^2" else 1 + c)


def _additions(gramian: Tensor, shares: Tensor, c: float | Tensor) -> Tensor:
    """Return two candidates `(2, m)` as constants, see `_search`."""
    wide = gramian.detach().double()
    radius = torch.as_tensor(c, dtype=torch.float64, device=wide.device).detach()
    pushed = products_with(wide, shares, torch.finfo(gramian.dtype).eps)
    return search(wide, shares, pushed, radius, ridge_of(gramian.dtype))


def _total(
    gramian: Tensor,
    shares: Tensor,
    c: float | Tensor,
    additions: Tensor,
    products: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Add the candidate of the better worst improvement, as far as the ball allows.

    Args:
        gramian: `(m, m)`.
        shares: `(m,)`, the weights of the mean gradient; 0 where a row is absent.
        c: The radius, relative to the length of the mean gradient.
        additions: `(2, m)`, the candidates.
        products: `(2, m)`, their inner products with the rows.
        lengths: `(2,)`, their lengths.

    Returns:
        The weights `(m,)` of mean gradient and addition.
    """
    wide = gramian.double()
    pushed = wide @ shares  # improvements under the mean gradient
    radius = c * safe_sqrt(pushed @ shares)
    reach = torch.where(lengths > 0, radius / torch.where(lengths > 0, lengths, 1.0), 0.0).detach()
    steep, close = reach[0], reach[1].clamp(max=1)
    norms = safe_sqrt(wide.diagonal()).detach()
    equal = TIED * norms * (norms @ shares)
    steepest, closest = additions[0] * steep, additions[1] * close
    gains = [pushed + products[0] * steep - equal, pushed + products[1] * close + equal]
    gain, other = (torch.where(shares > 0, x.detach(), torch.inf).amin() for x in gains)
    better = ~(other >= gain)
    added = torch.where(better, steepest, closest)
    if _host.numbers(wide) is None or not isinstance(c, float | int):
        slack = ~better & (reach[1] >= 1)
        added = added + _derivative(wide, pushed, radius, added > 0, slack, rank_tol(gramian))
    return shares + added


@torch.library.custom_op("torchjd_func::cagrad", mutates_args=())
def search(gramian: Tensor, shares: Tensor, pushed: Tensor, c: Tensor, ridge: float) -> Tensor:
    """Find the candidates for each problem of a batch; opaque to the compiler, as it ends early.

    Args:
        gramian: `(..., m, m)` float64.
        shares: `(..., m)` float64, of the mean gradient; 0 where a row is absent.
        pushed: `(..., m)` float64, improvements under the mean gradient.
        c: `(...,)` float64; leading dimensions broadcast.
        ridge: The rounding of the entries of `gramian`, relative to the diagonal.

    Returns:
        `(..., 2, m)`.
    """
    arrays = (x.detach().cpu().numpy() for x in (gramian, shares, pushed, c))
    return torch.from_numpy(_search(*arrays, ridge=ridge)).to(gramian.device)


@search.register_fake
def _fake(gramian: Tensor, shares: Tensor, pushed: Tensor, c: Tensor, ridge: float) -> Tensor:
    """Tell the compiler the shape."""
    shape = torch.broadcast_shapes(gramian.shape[:-2], shares.shape[:-1], c.shape)
    return gramian.new_empty((*shape, 2, gramian.shape[-1]))


@search.register_vmap
def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    """Search in one larger batch."""
    return search(*align(in_dims, *args[:4]), args[4]), 0


@np.errstate(all="ignore")  # what is not finite is seen in the result
def _search(gramian: Array, shares: Array, pushed: Array, c: Array, ridge: float) -> Array:
    """Return two additions to the mean gradient, one of which is optimal, to some length.

    The first points where the worst improvement rises most at the border of the ball, as weights of
    sum 1. The second is the shortest after which nothing conflicts, if there is one in the ball:
    where the rows balance, the first has no direction.
    """
    size = gramian.diagonal(0, -2, -1).max(axis=-1, initial=0.0)[..., None]
    size = np.where(size > 0, size, 1.0)
    unit, pushed = gramian / size[..., None], pushed / size
    square = (pushed * shares).sum(axis=-1).clip(min=0)
    far = np.where(shares > 0, 0.0, _present.FAR)[..., None] * np.eye(shares.shape[-1])
    steepest = _steepest(Rows(unit, far, pushed, square), c * np.sqrt(square), ridge)
    closest = on_host(unit, pushed, ridge, "auto").value
    return np.stack(np.broadcast_arrays(steepest, closest), axis=-2)


def _steepest(rows: Rows, radius: Array, ridge: float) -> Array:
    """Minimise the dual `w'Gb + radius |J'w|` over the simplex.

    For the length `s` that `|J'w|` has at the minimum, `w` is the min-norm point of the rows
    `g_i + (s / radius) g_0`, whose length is between `s` and that root. So from below one may step
    to this length, or, further, along a secant; halve, in logarithms, where that leaves what is
    known of the root.

    Returns:
        `w`, `(..., m)`.
    """
    nearest = nearest_on_host(rows.gramian + rows.far, ridge).value
    norms = np.sqrt(rows.gramian.diagonal(0, -2, -1).clip(min=0))
    shortest = SHORTEST * ridge**0.5 * (norms * nearest).sum(axis=-1)
    at = partial(_excess, rows, np.where(radius > 0, radius, 1.0), ridge)
    x = low = _log_length(rows.gramian, nearest, shortest) + 0 * radius
    high = 0 * low
    f, w = at(x)
    step, best = f, np.where(np.isfinite(w), w, nearest)
    done = ~(f > 0)
    for _ in range(STEPS):
        low, high = np.where(f > 0, x + f, low), np.where(f > 0, high, x + f)
        inside = (x + step >= low) & (x + step <= high)
        x, f_before, x_before = np.where(inside, x + step, 0.5 * (low + high)), f, x
        f, w = at(x)
        # Rows that the shift balances but for rounding may have no min-norm point.
        best = np.where(done[..., None] | ~np.isfinite(w), best, w)
        close = ~(np.abs(f) > LENGTH_TOL) & ~(2 * np.abs(f) < np.abs(f_before))
        done = done | close | ~(high > low)
        if done.all():
            break
        step = f * (x - x_before) / (f_before - f)
    return best


def _excess(rows: Rows, radius: Array, ridge: float, log_length: Array) -> tuple[Array, Array]:
    """Return by what factor (its logarithm) a length is exceeded by that of its `w`, and `w`."""
    shift = (np.exp(log_length) / radius)[..., None, None]
    along = rows.pushed[..., None] + rows.pushed[..., None, :]
    shifted = rows.gramian + shift * (along + shift * rows.square[..., None, None])
    w = nearest_on_host(shifted + rows.far, ridge).value
    return _log_length(rows.gramian, w, 0 * log_length) - log_length, w


def _log_length(gramian: Array, weights: Array, shortest: Array) -> Array:
    """Return the logarithm of the length of `J'w`, or of the shortest."""
    square = ((gramian @ weights[..., None])[..., 0] * weights).sum(axis=-1)
    return 0.5 * np.log(square.clip(min=np.maximum(shortest**2, TINY)))


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


def cagrad(c: float | Tensor = 0.5, *, rescale: str | None = None) -> Aggregator:
    r"""Maximise the worst improvement in a ball around the mean gradient.

    With $g_0$ the mean gradient,
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
    weighting = stateless("cagrad", partial(_weights, **options), widen=False)
    return Aggregator("cagrad", no_state, partial(_update, **options), weighting)
