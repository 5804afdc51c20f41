"""The non-negative quadratic program on a GPU: one launch, one program for each problem.

The method is that of `_pivoting`: principal pivoting on a matrix of unit diagonal plus a ridge of
the size of its rounding. All wrong indices are exchanged at once (Judice and Pires); where that
stalls, the driving-variable method (Cottle and Dantzig; Keller) starts again from the empty
support, and is finite. Then the solution is refined towards no ridge, as long as that improves it.

The tableau lives in registers. Its entries (i, j) and (j, i) differ in sign at most, negative
between a free and a pinned index, so that one reduction reads a row and a column. Nothing waits for
the host, and a CUDA graph can capture it. Triton comes with every CUDA build of torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 128  # unknowns of a problem; the tableau of more does not fit in registers


@triton.jit
def _unit(G, base, m, i, scale_rows, scale_columns, M: tl.constexpr):
    """Load a matrix, scaled to a unit diagonal, with an identity beyond its size."""
    both = (i < m)[:, None] & (i < m)[None, :]
    same = i[:, None] == i[None, :]
    A = tl.load(G + base + i[:, None] * m + i[None, :], mask=both, other=0.0)
    return tl.where(same & ~both, 1.0, A * scale_rows[:, None] * scale_columns[None, :])


@triton.jit
def _along_rows(x, same):
    """Turn a vector along columns into one along rows."""
    return tl.sum(tl.where(same, x[None, :], 0.0), axis=1)


@triton.jit
def _at(x, mask):
    """Read the one entry that is marked."""
    return tl.sum(tl.where(mask, x, 0.0), axis=0)


@triton.jit
def _solve(
    G, WHICH, Q, Z, FREE, RESIDUAL, PIVOTS, m, LIMIT, RIDGE: tl.constexpr, M: tl.constexpr
):
    """Solve problem `program_id` with matrix `WHICH[program_id]`."""
    pid = tl.program_id(0).to(tl.int64)
    base = tl.load(WHICH + pid) * m * m
    i = tl.arange(0, M)
    on = i < m
    same = i[:, None] == i[None, :]
    d = tl.load(G + base + i * m + i, mask=on, other=1.0)
    s = tl.where(d > 0, 1.0 / tl.sqrt(tl.where(d > 0, d, 1.0)), 1.0)
    s_rows = _along_rows(s, same)
    q = tl.load(Q + pid * m + i, mask=on, other=0.0) * s
    size = tl.max(tl.abs(q), axis=0)
    size = tl.where(size > 0, size, 1.0)
    q = tl.where(on, q / size, 1.0)
    linear = q
    T = _unit(G, base, m, i, s_rows, s, M) + tl.where(same, RIDGE, 0.0)
    free = i < 0
    pending = i < 0
    best = M + 1
    chances = 3
    driving = 0  # 0 exchanging at once, 1 one variable at a time
    drive = -1
    moved = size * 0.0
    pivots = 0
    state = 0  # 0 running, 1 solved, 2 failed
    while state == 0:
        tol = 1e-12 * (1.0 + tl.max(tl.where(free, q, 0.0), axis=0))
        p = -1
        if driving == 0:
            if tl.sum(pending.to(tl.int32), axis=0) == 0:
                wrong = q < -tol
                count = tl.sum(wrong.to(tl.int32), axis=0)
                if count == 0:
                    state = 1
                elif count < best:
                    best = count
                    chances = 3
                    pending = wrong
                elif chances > 0:
                    chances -= 1
                    pending = wrong
                else:
                    driving = 1
            if (state == 0) & (driving == 0):
                p = tl.min(tl.where(pending, i, M), axis=0)
                pending = pending & (i != p)
                if _at(tl.sum(tl.where(i[:, None] == p, T, 0.0), axis=0), i == p) < 1e-3 * RIDGE:
                    driving = 1
            if driving == 1:
                p = -1
                T = _unit(G, base, m, i, s_rows, s, M) + tl.where(same, RIDGE, 0.0)
                q = linear
                free = i < 0
        elif drive < 0:
            w = tl.where(free, 0.0, q)
            lowest = tl.min(w, axis=0)
            if lowest >= -tol:
                state = 1
            else:
                drive = tl.min(tl.where(w == lowest, i, M), axis=0)
                moved = size * 0.0
        else:
            row = tl.sum(tl.where(i[:, None] == drive, T, 0.0), axis=0)
            column = row * tl.where(free, -1.0, 1.0)  # the driving index is pinned
            slope = _at(row, i == drive)
            usable = slope > 1e-3 * RIDGE
            whole = tl.where(usable, -_at(q, i == drive) / tl.where(usable, slope, 1.0), float("inf"))
            falling = free & (column < -1e-12)
            ratio = tl.where(falling, q / tl.where(falling, -column, 1.0), float("inf"))
            step = tl.min(ratio, axis=0)
            if whole <= step:
                if whole == float("inf"):
                    state = 2
                else:
                    p = drive
            else:
                p = tl.min(tl.where(ratio == step, i, M), axis=0)
                q = tl.where(i == p, 0.0, q + column * step)
                moved += step
        if (p >= 0) & (state == 0):
            row = tl.sum(tl.where(i[:, None] == p, T, 0.0), axis=0)
            isp = i == p
            sign = tl.where(free, -1.0, 1.0)
            column = tl.where(isp, 0.0, row * sign * _at(sign, isp))
            at = _at(row, isp)
            value = _at(q, isp)
            r = tl.where(isp, 0.0, row / at)
            T = T - _along_rows(column, same)[:, None] * r[None, :]
            q = tl.where(isp, -value / at, q - column * (value / at))
            T = tl.where(isp[:, None], -r[None, :], T)
            T = tl.where(isp[None, :], _along_rows(column / at, same)[:, None], T)
            T = tl.where(isp[:, None] & isp[None, :], 1.0 / at, T)
            free = free ^ isp
            if p == drive:
                q = tl.where(isp, q + moved, q)
                drive = -1
            pivots += 1
            if pivots >= LIMIT:
                state = 2
    x = tl.where(free & (q > 0), q, 0.0)
    U = _unit(G, base, m, i, s_rows, s, M)
    w = tl.sum(U * _along_rows(x, same)[:, None], axis=0) + linear
    gap = tl.max(tl.where(on, tl.abs(tl.minimum(x, w)), 0.0), axis=0)
    refining = 1
    for _ in range(3):
        descent = _along_rows(tl.where(free, -w, 0.0), same)
        y = x + tl.where(free, tl.sum(T * descent[:, None], axis=0), 0.0)
        lowest = tl.min(y, axis=0) + 1e-13 * (1.0 + tl.max(y, axis=0))
        y = tl.where(y > 0, y, 0.0)
        v = tl.sum(U * _along_rows(y, same)[:, None], axis=0) + linear
        left = tl.max(tl.where(on, tl.abs(tl.minimum(y, v)), 0.0), axis=0)
        better = (refining == 1) & (lowest >= 0.0) & (left < 0.5 * gap)
        refining = tl.where(better, refining, 0)
        x = tl.where(better, y, x)
        w = tl.where(better, v, w)
        gap = tl.where(better, left, gap)
    # Not-a-number, which compares as nothing, also passes for solved.
    whole_sum = tl.sum(tl.where(on, w, 0.0), axis=0)
    residual = gap / (1.0 + tl.max(x, axis=0)) + 0.0 * whole_sum
    residual = tl.where(state == 1, residual, float("nan"))
    tl.store(Z + pid * m + i, x * s * size + 0.0 * residual, mask=on)
    tl.store(FREE + pid * m + i, free, mask=on)
    tl.store(RESIDUAL + pid, residual)
    tl.store(PIVOTS + pid, pivots)


def solve_kernel(
    matrices: Tensor, which: Tensor, vectors: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimise `z'Qz / 2 + q'z` over `z >= 0`, for many small problems at once.

    Args:
        matrices: `(k, m, m)` float64, `m` at most `LARGEST`.
        which: `(p,)` int64, the matrix of each problem.
        vectors: `(p, m)` float64.
        ridge: What is added to the unit diagonal, of the size of the rounding of the matrices.

    Returns:
        `z` `(p, m)`, not-a-number where unsolved; its support `(p, m)` bool; the relative residual
        `(p,)` of the conditions of optimality without the ridge; and pivots `(p,)` int32.
    """
    p, m = vectors.shape
    z = torch.empty_like(vectors)
    free = torch.empty(vectors.shape, dtype=torch.bool, device=vectors.device)
    residual = vectors.new_empty((p,))
    pivots = torch.empty((p,), dtype=torch.int32, device=vectors.device)
    if p:
        size = max(2, triton.next_power_of_2(m))
        warps = 1 if size <= 16 else 4 if size <= 64 else 16
        launch: Any = _solve[(p,)]
        launch(
            *(matrices.contiguous(), which, vectors.contiguous(), z, free, residual, pivots),
            *(m, 20 * m + 40, ridge, size),
            num_warps=warps,
        )
    return z, free, residual, pivots
