"""Pivots one at a time: one problem by a driving variable, many that share a matrix from one.

The tableau of a support F has, in the place of Q, the matrix that maps what is zero, `y_F` and the
others of z, to what is not; in the place of q the value of that. To exchange an index is a change
of rank one.

Many problems: the tableau of a problem in the middle is positive there, and from it straight lines
lead to the vectors of the others. Along a line an index is exchanged where its value reaches zero
(parametric pivoting: always possible, and finite, if the matrix is definite and no two do so at
once). There are few such on each line, so their changes are kept as products, and the one tableau
of `m^2` numbers serves all problems: `p` pivots cost `p^2 m`, where a factorisation costs `m^3`.

R. W. Cottle, G. B. Dantzig, Complementary pivot theory of mathematical programming, Linear Algebra
and its Applications 1, 1968. R. W. Cottle, J.-S. Pang, R. E. Stone, The Linear Complementarity
Problem, 1992, section 4.5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from torchjd_func._host import Array

# Signs are told apart relative to rounding in `Qz + q`, whose terms grow with `z`.
SIGN_TOL = 1e-12
# Pivots for each unknown before the driving-variable method gives up.
PIVOTS = 40
# Of so many lines to the first problems most arrive, or no more are followed.
FIRST = 8
# What values in the middle are raised by, so that no two reach zero at once.
RAISED = 1e-9


class Tableau(NamedTuple):
    """What the problems on a matrix are like, seen from a support."""

    matrix: Array  # (m, m)
    free: Array  # (m,) bool, the support


def tableau(matrix: Array, free: Array) -> Tableau:
    """Exchange the indices of a support."""
    kept, rest = np.flatnonzero(free), np.flatnonzero(~free)
    inverse = np.linalg.inv(matrix[np.ix_(kept, kept)])
    across = matrix[np.ix_(rest, kept)] @ inverse
    seen = np.empty_like(matrix)
    seen[np.ix_(kept, kept)], seen[np.ix_(kept, rest)] = inverse, -across.T
    seen[np.ix_(rest, kept)] = across
    seen[np.ix_(rest, rest)] = matrix[np.ix_(rest, rest)] - across @ matrix[np.ix_(kept, rest)]
    return Tableau(seen, free)


def values(seen: Tableau, vectors: Array) -> Array:
    """Return the values of problems `(N, m)`: `z` on the support, and slopes elsewhere."""
    kept = np.where(seen.free, vectors, 0.0)
    return np.where(seen.free, 0.0, vectors) - kept @ seen.matrix.T


def supports(seen: Tableau, middle: Array, vectors: Array) -> tuple[Array, Array, Array]:
    """Go to problems `(N, m)` from one that is solved.

    Args:
        seen: The tableau of the support of its solution.
        middle: `(m,)`, its vector.
        vectors: `(N, m)`.

    Returns:
        The supports `(N, m)`, pivots `(N,)`, and whether each problem was reached.
    """
    m = len(middle)
    raised = RAISED * (2 + np.cos(np.arange(m) ** 2))
    start, ends = values(seen, middle[None])[0].clip(min=0) + raised, values(seen, vectors)
    changes = np.empty((2, m // 2, m))
    free, pivots, reached = (
        vectors < 0,
        np.zeros(len(ends), dtype=np.int64),
        ends[:, 0] != ends[:, 0],
    )
    for i, end in enumerate(ends):
        free[i], pivots[i], reached[i] = _follow(seen, start, end, changes)
        if i == FIRST and 2 * np.count_nonzero(reached) < FIRST:
            break
    return free, pivots, reached


def _follow(seen: Tableau, start: Array, end: Array, changes: Array) -> tuple[Array, int, bool]:
    """Exchange what reaches zero between two values, `end + t (start - end)` for t from 1 to 0."""
    free, end, slope, (left, right) = seen.free.copy(), end.copy(), start - end, changes
    for count in range(len(left)):
        times = np.where(slope > 0, -end / slope, 0.0)
        k = int(times.argmax())
        if not times[k] > SIGN_TOL:
            return free, count, bool(np.isfinite(times[k]))
        row = seen.matrix[k] - left[:count, k] @ right[:count]
        pivot = row[k]
        if not pivot > 0:
            break
        column = np.where(free == free[k], row, -row)  # but for signs the matrix is symmetric
        at, rate = end[k] / pivot, slope[k] / pivot
        end -= at * column
        slope -= rate * column
        end[k], slope[k] = -at, -rate
        left[count], right[count] = column, row / pivot
        left[count, k] += 1
        right[count, k] -= 1 / pivot
        free[k] ^= True
    return free, len(left), False


def solve_seen(seen: Tableau, free: Array, right: Array) -> Array:
    """Solve `Q_FF x_F = b_F` for problems `(N, m)` by systems of what their supports differ in."""
    x = values(seen, np.where(free, -right, 0.0))
    for index, changed in enumerate(free != seen.free):
        k = np.flatnonzero(changed)
        rows, signs = seen.matrix[k], np.where(seen.free == seen.free[k, None], 1.0, -1.0)
        part = np.linalg.solve(rows[:, k], -x[index, k])
        x[index] += part @ (rows * signs)
        x[index, k] = part
    return np.where(free, x, 0.0)


def drive(matrix: Array, vector: Array, near: Array) -> tuple[Array, Array, int]:
    """Solve one problem by the driving-variable method, on a tableau, from a support `(m,)`.

    Returns:
        `(z, support, pivots)`; `z` is not-a-number if it fails.
    """
    m, free, pivots = len(vector), _positive(matrix, vector, near.copy()), 0
    seen = tableau(matrix, free)
    table, value = seen.matrix, values(seen, vector[None])[0]
    while pivots < PIVOTS * (m + 1):
        pinned = np.where(free, 0.0, value)
        k, driven = int(pinned.argmin()), 0.0
        if pinned[k] >= -SIGN_TOL * (1 + np.where(free, value, 0.0).max()):
            return np.where(free, value, 0.0), free, pivots
        while pivots < PIVOTS * (m + 1):
            column = np.where(free, table[:, k], 0.0)
            falling = column < -SIGN_TOL
            ratio = np.where(falling, value / np.where(falling, -column, 1.0), np.inf)
            i = int(ratio.argmin())
            if not ratio[i] * table[k, k] < -value[k]:
                break
            value += table[:, k] * ratio[i]
            value[i], driven = 0.0, driven + ratio[i]
            _pivot(table, value, free, i)
            pivots += 1
        if not table[k, k] > 0:
            break
        _pivot(table, value, free, k)
        value[k] += driven
        pivots += 1
    return np.full(m, np.nan), free, pivots


def _positive(matrix: Array, vector: Array, free: Array) -> Array:
    """Take out of a support what is negative on it, until nothing is."""
    while free.any():
        kept = np.flatnonzero(free)
        negative = ~(np.linalg.solve(matrix[np.ix_(kept, kept)], -vector[kept]) >= 0)
        if not negative.any():
            break
        free[kept[negative]] = False
    return free


def _pivot(table: Array, value: Array, free: Array, k: int) -> None:
    """Exchange one index of a table, in place."""
    p, row, column, at = table[k, k], table[k].copy(), table[:, k].copy(), value[k]
    # In one pass through memory; numpy takes four.
    torch.from_numpy(table).addr_(torch.from_numpy(column), torch.from_numpy(row / p), alpha=-1)
    value -= column * (at / p)
    table[k], table[:, k], table[k, k], value[k] = -row / p, column / p, 1 / p, -at / p
    free[k] ^= True
