"""Principal pivoting on a GPU, for kernels: a quadratic program in the registers of a program.

The method is that of `linalg._pivoting`, with a ridge from the start, and driving from the empty
support.

The tableau lives in registers. Its entries (i, j) and (j, i) differ in sign at most, negative
between a free and a pinned index, so that one reduction reads a row and a column.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from torchjd_func.linalg import _pivoting

SIGN_TOL, PATIENCE = tl.constexpr(_pivoting.SIGN_TOL), tl.constexpr(_pivoting.PATIENCE)
REFINEMENTS, CHANGED = tl.constexpr(_pivoting.REFINEMENTS), tl.constexpr(_pivoting.CHANGED)


@triton.jit
def _unit(G, base, m, i, scale_rows, scale_columns, M: tl.constexpr):
    """Load a matrix, scaled to a unit diagonal, with an identity beyond its size."""
    both = (i < m)[:, None] & (i < m)[None, :]
    same = i[:, None] == i[None, :]
    A = tl.load(G + base + i[:, None] * m + i[None, :], mask=both, other=0.0)
    return tl.where(same & ~both, 1.0, A * scale_rows[:, None] * scale_columns[None, :])


@triton.jit
def _shifted(
    G,
    base,
    m,
    i,
    scale_rows,
    scale_columns,
    factor,
    add_rows,
    add,
    extra,
    M: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Load likewise `factor G_ij + add_i + add_j`, with more on the diagonal, if shifted."""
    if not SHIFT:
        return _unit(G, base, m, i, scale_rows, scale_columns, M)
    both = (i < m)[:, None] & (i < m)[None, :]
    same = i[:, None] == i[None, :]
    A = factor * tl.load(G + base + i[:, None] * m + i[None, :], mask=both, other=0.0)
    A = A + (add_rows[:, None] + add[None, :]) + tl.where(same, extra[None, :], 0.0)
    A = tl.where(both, A * scale_rows[:, None] * scale_columns[None, :], 0.0)
    return tl.where(same & ~both, 1.0, A)


@triton.jit
def _along_rows(x, same):
    """Turn a vector along columns into one along rows."""
    return tl.sum(tl.where(same, x[None, :], 0.0), axis=1)


@triton.jit
def _at(x, mask):
    """Read the one entry that is marked."""
    return tl.sum(tl.where(mask, x, 0.0), axis=0)


@triton.jit
def _pivot(T, q, free, i, same, p):
    """Exchange index `p`: one sweep of the tableau."""
    isp = i == p
    row = tl.sum(tl.where(i[:, None] == p, T, 0.0), axis=0)
    sign = tl.where(free, -1.0, 1.0)
    at = _at(row, isp)
    value = _at(q, isp)
    column = tl.where(isp, 0.0, row * sign * _at(sign, isp))
    r = tl.where(isp, 0.0, row / at)
    q = tl.where(isp, -value / at, q - column * (value / at))
    # With 1 in the place of the pivot, row p becomes -r, and column p is what is divided.
    c = _along_rows(tl.where(isp, 1.0, column), same)
    T = tl.where(i[:, None] == p, 0.0, T) - c[:, None] * r[None, :]
    T = tl.where(isp[None, :], c[:, None] / at, T)
    entering = _at(tl.where(free, 0.0, 1.0), isp) > 0.0
    return T, q, free ^ isp, tl.where(entering, at, 1.0)


@triton.jit
def _refine(
    T,
    q,
    free,
    linear,
    G,
    base,
    m,
    i,
    s_rows,
    s,
    same,
    factor,
    add_rows,
    add,
    extra,
    M: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Take steps towards no ridge, as long as one halves the residual and changes no sign."""
    on = i < m
    x = tl.where(free & (q > 0), q, 0.0)
    U = _shifted(G, base, m, i, s_rows, s, factor, add_rows, add, extra, M, SHIFT)
    w = tl.sum(U * _along_rows(x, same)[:, None], axis=0) + linear
    gap = tl.max(tl.where(on, tl.abs(tl.minimum(x, w)), 0.0), axis=0)
    refining = 1
    for _ in range(REFINEMENTS):
        descent = _along_rows(tl.where(free, -w, 0.0), same)
        y = x + tl.where(free, tl.sum(T * descent[:, None], axis=0), 0.0)
        lowest = tl.min(y, axis=0) + CHANGED * (1.0 + tl.max(y, axis=0))
        y = tl.where(y > 0, y, 0.0)
        U = _shifted(G, base, m, i, s_rows, s, factor, add_rows, add, extra, M, SHIFT)
        v = tl.sum(U * _along_rows(y, same)[:, None], axis=0) + linear
        left = tl.max(tl.where(on, tl.abs(tl.minimum(y, v)), 0.0), axis=0)
        better = (refining == 1) & (lowest >= 0.0) & (left < 0.5 * gap)
        refining = tl.where(better, refining, 0)
        x = tl.where(better, y, x)
        w = tl.where(better, v, w)
        gap = tl.where(better, left, gap)
    # Not-a-number, which compares as nothing, also passes for solved.
    residual = gap / (1.0 + tl.max(x, axis=0)) + 0.0 * tl.sum(tl.where(on, w, 0.0), axis=0)
    return x, residual


@triton.jit
def _exchange(T, q, free, i, same, M: tl.constexpr, RIDGE: tl.constexpr):
    """Exchange all wrong indices, until none is wrong or their number stalls."""
    pending = i < 0
    best = M + 1
    chances = PATIENCE
    pivots = 0
    least = 1.0 + 0.0 * tl.max(q, axis=0)
    state = 0  # 0 running, 1 solved, 2 stalled
    while state == 0:
        if tl.sum(pending.to(tl.int32), axis=0) == 0:
            pending = q < -SIGN_TOL * (1.0 + tl.max(tl.where(free, q, 0.0), axis=0))
            count = tl.sum(pending.to(tl.int32), axis=0)
            if count == 0:
                state = 1
            elif count < best:
                best = count
                chances = PATIENCE
            elif chances > 0:
                chances -= 1
            else:
                state = 2
        if state == 0:
            p = tl.min(tl.where(pending, i, M), axis=0)
            pending = pending & (i != p)
            if _at(tl.sum(tl.where(i[:, None] == p, T, 0.0), axis=0), i == p) < 1e-3 * RIDGE:
                state = 2
            else:
                T, q, free, at = _pivot(T, q, free, i, same, p)
                least = tl.minimum(least, at)
                pivots += 1
    return T, q, free, pivots, least, state


@triton.jit
def _drive(T, q, free, i, same, LIMIT, M: tl.constexpr, RIDGE: tl.constexpr):
    """Bring in one variable at a time, from the empty support; finite."""
    drive = -1
    moved = 0.0 * tl.max(q, axis=0)
    pivots = 0
    least = 1.0 + moved
    state = 0  # 0 running, 1 solved, 2 failed
    while state == 0:
        if drive < 0:
            w = tl.where(free, 0.0, q)
            lowest = tl.min(w, axis=0)
            if lowest >= -SIGN_TOL * (1.0 + tl.max(tl.where(free, q, 0.0), axis=0)):
                state = 1
            else:
                drive = tl.min(tl.where(w == lowest, i, M), axis=0)
                moved = 0.0 * lowest
        if state == 0:
            p = drive
            row = tl.sum(tl.where(i[:, None] == drive, T, 0.0), axis=0)
            column = row * tl.where(free, -1.0, 1.0)  # the driving index is pinned
            slope = _at(row, i == drive)
            usable = slope > 1e-3 * RIDGE
            whole = -_at(q, i == drive) / tl.where(usable, slope, 1.0)
            whole = tl.where(usable, whole, float("inf"))
            falling = free & (column < -SIGN_TOL)
            ratio = tl.where(falling, q / tl.where(falling, -column, 1.0), float("inf"))
            step = tl.min(ratio, axis=0)
            if step < whole:
                p = tl.min(tl.where(ratio == step, i, M), axis=0)
                q = tl.where(i == p, 0.0, q + column * step)
                moved += step
            if (tl.minimum(step, whole) == float("inf")) | (pivots >= LIMIT):
                state = 2
            else:
                T, q, free, at = _pivot(T, q, free, i, same, p)
                least = tl.minimum(least, at)
                pivots += 1
                if p == drive:
                    q = tl.where(i == p, q + moved, q)
                    drive = -1
    return T, q, free, pivots, least, state


@triton.jit
def _minimise(
    G,
    base,
    linear,
    m,
    i,
    same,
    factor,
    add,
    extra,
    LIMIT,
    tol,
    RIDGE: tl.constexpr,
    M: tl.constexpr,
    DRIVE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Solve the problem of the matrix at `G + base`, shifted or as it is."""
    on = i < m
    d = tl.load(G + base + i * m + i, mask=on, other=1.0)
    if SHIFT:
        d = tl.where(on, factor * d + (add + add) + extra, 1.0)
    add_rows = _along_rows(add, same)
    s = tl.where(d > 0, 1.0 / tl.sqrt(tl.where(d > 0, d, 1.0)), 1.0)
    s_rows = _along_rows(s, same)
    linear = linear * s
    size = tl.max(tl.abs(linear), axis=0)
    size = tl.where(size > 0, size, 1.0)
    linear = tl.where(on, linear / size, 1.0)
    T = _shifted(G, base, m, i, s_rows, s, factor, add_rows, add, extra, M, SHIFT)
    T = T + tl.where(same, RIDGE, 0.0)
    if DRIVE:
        T, q, free, pivots, least, state = _drive(T, linear, i < 0, i, same, LIMIT, M, RIDGE)
    else:
        T, q, free, pivots, least, state = _exchange(T, linear, i < 0, i, same, M, RIDGE)
    x, residual = _refine(
        T, q, free, linear, G, base, m, i, s_rows, s, same, factor, add_rows, add, extra, M, SHIFT
    )
    # With a ridge a solution may be as long as the root of one over it; an infinite one is longer.
    sound = (state == 1) & (residual <= tol) & (tl.max(x, axis=0) < RIDGE**-0.75)
    return tl.where(sound, x * s * size, float("nan")), free, sound, pivots, least, state


def start(kernel: Any, programs: int, n_warps: int, *arguments: Any) -> None:
    """Launch a kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[programs,](*arguments, **options(n_warps))


def padded(m: int) -> int:
    """Return the size of the registers for `m` unknowns."""
    return max(2, triton.next_power_of_2(m))


def warps(size: int) -> int:
    """Return how many warps share a problem (measured on an H100)."""
    return 1 if size <= 16 else 4 if size <= 32 else 8


def options(n_warps: int) -> dict[str, Any]:
    """Return how to compile a kernel, the same with every version of Triton."""
    return {"num_warps": n_warps, "enable_fp_fusion": True}  # the default changes in 3.10
