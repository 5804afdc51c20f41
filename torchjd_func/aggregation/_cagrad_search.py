"""The search of CAGrad for what is added to the mean gradient: on the host, or in a kernel."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host, _present
from torchjd_func._host import Array
from torchjd_func.linalg._dense import times
from torchjd_func.linalg._device import takes
from torchjd_func.linalg._search import nearest_on_host, on_host
from torchjd_func.linalg._systems import KKT_TOL

# Steps of the search for the length of the addition (5 to 10 do); the shortest, over the root of
# the ridge; and its relative error, at which a step that does not halve it is the last.
STEPS, SHORTEST, LENGTH_TOL = 60, 0.3, 1e-9
TINY = np.finfo(np.float64).tiny  # logarithms are not taken of less


class Rows(NamedTuple):
    """What the search knows of the rows; the longest has length 1."""

    gramian: Array  # (..., m, m)
    far: Array  # (..., m, m), keeps absent rows from being near
    pushed: Array  # (..., m), improvements under the mean gradient
    square: Array  # (...,), its squared length


def find(gramian: Tensor, shares: Tensor, pushed: Tensor, c: Tensor, ridge: float) -> Tensor:
    """Find two candidates `(..., 2, m)`, as constants."""
    operation = _IN_KERNEL if takes(shares) else _ON_HOST
    return _host.opaque(operation, _candidates, gramian, shares, pushed, c, ridge)


def _candidates(gramian: Tensor, shares: Tensor, pushed: Tensor, c: Tensor, ridge: float) -> Tensor:
    """Find them, in a kernel what fits one, else on the host; opaque, as the search ends early.

    Args:
        gramian: `(..., m, m)` float64.
        shares: `(..., m)` float64, of the mean gradient; 0 where a row is absent.
        pushed: `(..., m)` float64, improvements under the mean gradient.
        c: `(...,)` float64; leading dimensions broadcast.
        ridge: The rounding of the entries of `gramian`, relative to the diagonal.

    Returns:
        `(..., 2, m)`, see `_search`.
    """
    if not takes(shares):
        arrays = (x.detach().cpu().numpy() for x in (gramian, shares, pushed, c))
        return torch.from_numpy(_search(*arrays, ridge=ridge)).to(gramian.device)
    from torchjd_func._kernels.cagrad import search_kernel  # needs Triton

    shape = torch.broadcast_shapes(gramian.shape[:-2], shares.shape[:-1], c.shape)
    m, n = shares.shape[-1], math.prod(shape)
    found = search_kernel(
        gramian.expand((*shape, m, m)).reshape(n, m, m),
        shares.expand((*shape, m)).reshape(n, m),
        pushed.expand((*shape, m)).reshape(n, m),
        c.expand(shape).reshape(n),
        ridge=ridge,
        tol=max(KKT_TOL, 2 * ridge),
        steps=STEPS,
        shortest=SHORTEST * ridge**0.5,
        length_tol=LENGTH_TOL,
    )
    return found.reshape((*shape, 2, m))


def _fake(gramian: Tensor, shares: Tensor, pushed: Tensor, c: Tensor, ridge: float) -> Tensor:
    """Tell the compiler the shape."""
    shape = torch.broadcast_shapes(gramian.shape[:-2], shares.shape[:-1], c.shape)
    return gramian.new_empty((*shape, 2, gramian.shape[-1]))


# For what fits a kernel, and what waits for the host.
_IN_KERNEL = _host.operation("cagrad", _candidates, _fake, broadcasts=True)
_ON_HOST = _host.operation("cagrad_waits", _candidates, _fake, waits=True, broadcasts=True)


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
    square = (times(gramian, weights) * weights).sum(axis=-1)
    return 0.5 * np.log(square.clip(min=np.maximum(shortest**2, TINY)))
