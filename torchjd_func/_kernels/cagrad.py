"""CAGrad's two candidates on a GPU: the search of `aggregation._cagrad`, in two launches.

The second repeats, by the driving-variable method, what block exchange does not solve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchjd_func import _present
from torchjd_func._kernels.pivoting import _along_rows, _minimise, padded, start, warps
from torchjd_func.linalg._pivoting import PIVOTS

TINY = tl.constexpr(torch.finfo(torch.float64).tiny)
FAR = tl.constexpr(_present.FAR)


@triton.jit
def _shift(d, on, factor, pushed, square, far, shift, near):
    """Return what makes the Gramian that of rows `g_i + shift g_0`; near, their min-norm problem.

    That is `add` of `factor G_ij + add_i + add_j`, more of the diagonal, and the linear term.
    """
    add = shift * (pushed + 0.5 * shift * square)
    extra = tl.where(near, far, 0.0)
    diagonal = factor * d + (add + add) + extra
    kappa = tl.min(tl.where(on & (diagonal > 0), diagonal, float("inf")), axis=0)
    kappa = tl.where(near, tl.where(kappa < float("inf"), kappa, 1.0), 0.0)
    return add + 0.5 * kappa, extra, tl.where(on, tl.where(near, -kappa, pushed), 0.0)


@triton.jit
def _log_length(G, base, m, i, same, inverse, w, shortest, M: tl.constexpr):
    """Return the logarithm of the length of `J'w`, or of the shortest; not-a-number with `w`."""
    both = (i < m)[:, None] & (i < m)[None, :]
    U = tl.load(G + base + i[:, None] * m + i[None, :], mask=both, other=0.0) * inverse
    square = tl.sum(tl.sum(U * _along_rows(w, same)[:, None], axis=0) * w, axis=0)
    # `maximum` passes over what is not a number.
    length = 0.5 * tl.log(tl.maximum(square, tl.maximum(shortest * shortest, TINY)))
    return length + 0.0 * square


@triton.jit(do_not_specialize=["m", "LIMIT", "STEPS"])
def _search(
    G,
    SHARES,
    PUSHED,
    RADIUS,
    OUT,
    STATE,
    m,
    LIMIT,
    STEPS,
    shortest,
    length_tol,
    tol,
    RIDGE: tl.constexpr,
    M: tl.constexpr,
    DRIVE: tl.constexpr,
):
    """Search for problem `program_id`; driving, only what is left."""
    pid = tl.program_id(0).to(tl.int64)
    if DRIVE and tl.load(STATE + pid) == 1:
        return
    base = pid * m * m
    i = tl.arange(0, M)
    on = i < m
    same = i[:, None] == i[None, :]
    d = tl.load(G + base + i * m + i, mask=on, other=0.0)
    largest = tl.max(d, axis=0)
    inverse = 1.0 / tl.where(largest > 0, largest, 1.0)
    shares = tl.load(SHARES + pid * m + i, mask=on, other=0.0)
    pushed = tl.load(PUSHED + pid * m + i, mask=on, other=0.0) * inverse
    square = tl.maximum(tl.sum(pushed * shares, axis=0), 0.0)
    far = tl.where(shares > 0, 0.0, FAR).to(tl.float64)
    radius = tl.load(RADIUS + pid) * tl.sqrt(square)
    radius = tl.where(radius > 0, radius, 1.0)
    norms = tl.sqrt(tl.maximum(d * inverse, 0.0))
    # Round 0 finds the shortest addition after which nothing conflicts, round 1 the lowest length
    # that there may be; then a secant method, kept inside of what is known of the root.
    x, f, step, low, high = 0.0 * square, 0.0 * square, 0.0 * square, 0.0 * square, 0.0 * square
    best = 0.0 * pushed + float("nan")
    round = 0
    state = 1
    running = True
    while running & (state == 1) & (round < STEPS + 3):
        near = round > 0
        shift = tl.where(round > 1, tl.exp(x) / radius, 0.0)
        add, extra, linear = _shift(d, on, inverse, pushed, square, far, shift, near)
        w, _, _, _, _, state = _minimise(
            G, base, linear, m, i, same, inverse, add, extra, LIMIT, tol, RIDGE, M, DRIVE, True
        )
        w = tl.where(on, w, 0.0)
        w = w / tl.where(near, tl.sum(w, axis=0), 1.0)
        if round == 0:
            tl.store(OUT + (2 * pid + 1) * m + i, w, mask=on)
        # Rows that the shift balances but for rounding may have no min-norm point.
        finite = tl.abs(tl.sum(0.0 * w, axis=0)) <= 0.0
        best = tl.where(near & finite, w, best)
        least = tl.where(round == 1, shortest * tl.sum(norms * w, axis=0), 0.0)
        length = _log_length(G, base, m, i, same, inverse, w, least, M)
        if round == 1:
            x = length
            low = length
        if round > 1:
            f_before = tl.where(round == 2, float("inf"), f)
            x_before = x - step
            f = length - x
            near_root = (tl.abs(f) > length_tol) | (2.0 * tl.abs(f) < tl.abs(f_before))
            running = tl.where(round == 2, f > 0, near_root & (high > low))
            low, high = tl.where(f > 0, x + f, low), tl.where(f > 0, high, x + f)
            step = tl.where(round == 2, f, f * (x - x_before) / (f_before - f))
            inside = (x + step >= low) & (x + step <= high)
            after = tl.where(inside, x + step, 0.5 * (low + high))
            step = after - x
            x = after
        round += 1
    tl.store(OUT + 2 * pid * m + i, best, mask=on)
    tl.store(STATE + pid, state)


def search_kernel(
    matrices: Tensor,
    shares: Tensor,
    pushed: Tensor,
    radii: Tensor,
    *,
    ridge: float,
    tol: float,
    steps: int,
    shortest: float,
    length_tol: float,
) -> Tensor:
    """Find the candidates.

    Args:
        matrices: `(k, m, m)` float64, `m` at most `linalg._device.LARGEST`.
        shares: `(k, m)` float64.
        pushed: `(k, m)` float64, improvements under the mean gradient.
        radii: `(k,)` float64, relative to the length of the mean gradient.
        ridge: The rounding of the entries of `matrices`, relative to the diagonal.
        tol: The largest residual of a quadratic program.
        steps: Largest number of steps.
        shortest: The shortest addition, relative to rows.
        length_tol: The relative error of the length.

    Returns:
        `(k, 2, m)`.
    """
    k, m, _ = matrices.shape
    matrices, found = matrices.contiguous(), matrices.new_empty((k, 2, m))
    arrays = matrices, *(x.contiguous() for x in (shares, pushed, radii)), found
    state = torch.empty(k, dtype=torch.int32, device=matrices.device)
    # A warp holds 8 x 8 numbers without copies of any.
    size = max(8, padded(m))
    for drive in (False, True) if k else ():
        sizes = m, PIVOTS * (m + 1), steps, shortest, length_tol, tol, ridge, size, drive
        start(_search, k, warps(size), *arrays, state, *sizes)
    return found
