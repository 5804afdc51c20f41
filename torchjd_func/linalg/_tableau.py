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
from torchjd_func.linalg._systems import product

# Signs are told apart relative to rounding in `Qz + q`, whose terms grow with `z`.
SIGN_TOL = 1e-12
# Of so many lines to the first problems most arrive, or no more are followed.
FIRST = 8
# Exchanges that are kept as products before they are put into a matrix of their own.
FOLDED = 64
# What values in the middle are raised by, so that no two reach zero at once.
RAISED = 1e-9


def probe_of(m: int) -> Array:
    """Return a vector like no other."""
    return np.cos(np.arange(m) ** 2)


class Tableau(NamedTuple):
    """What the problems on a matrix are like, seen from a support."""

    matrix: Array  # (m, m)
    free: Array  # (m,) bool, the support


class Changing:
    """A tableau on its way: of what it was, the rows and columns not exchanged, less products."""

    def __init__(self, seen: Tableau, changes: Array):
        self.matrix, self.free = seen.matrix, seen.free.copy()
        self.left, self.right = changes  # (p, m) each, one product for each exchange
        self.count, self.kept = 0, np.ones(len(seen.free))

    def column(self, k: int) -> tuple[Array, float]:
        """Return a column, and its entry on the diagonal."""
        row = product(self.left[: self.count, k][None], self.right[: self.count])[0]
        row = self.matrix[k] * self.kept - row if self.kept[k] else -row
        # But for signs the matrix is symmetric.
        return np.where(self.free == self.free[k], row, -row), row[k]

    def exchange(self, k: int, column: Array) -> None:
        """Exchange an index; its column is used up."""
        if self.count == len(self.left):  # put what has changed into the matrix, in place
            self.matrix[self.kept == 0], self.matrix[:, self.kept == 0] = 0.0, 0.0
            left, right = map(torch.from_numpy, (self.left, self.right))
            torch.from_numpy(self.matrix).addmm_(left.T, right, alpha=-1)  # no other matrix
            self.count, self.kept = 0, np.ones(len(self.free))
        row = np.where(self.free == self.free[k], column, -column) / column[k]
        row[k], column[k] = -1 / column[k], 1.0
        # Were these left to cancel, a large pivot would leave only rounding.
        self.left[: self.count, k] = self.right[: self.count, k] = self.kept[k] = 0.0
        self.left[self.count], self.right[self.count] = column, row
        self.count += 1
        self.free[k] ^= True


def tableau(matrix: Array, free: Array) -> Tableau:
    """Exchange the indices of a support."""
    kept, rest = np.flatnonzero(free), np.flatnonzero(~free)
    inverse = torch.linalg.inv_ex(torch.from_numpy(matrix[np.ix_(kept, kept)]))[0].numpy()
    across = product(matrix[np.ix_(rest, kept)], inverse)
    seen = np.empty_like(matrix)
    seen[np.ix_(kept, kept)], seen[np.ix_(kept, rest)] = inverse, -across.T
    seen[np.ix_(rest, kept)] = across
    changed = product(across, matrix[np.ix_(kept, rest)])
    seen[np.ix_(rest, rest)] = matrix[np.ix_(rest, rest)] - changed
    return Tableau(seen, free)


def values(seen: Tableau, vectors: Array) -> Array:
    """Return the values of problems `(N, m)`: `z` on the support, and slopes elsewhere."""
    kept = np.where(seen.free, vectors, 0.0)
    return np.where(seen.free, 0.0, vectors) - product(kept, seen.matrix.T)


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
    raised = RAISED * (2 + probe_of(m))
    start, ends = values(seen, middle[None])[0].clip(min=0) + raised, values(seen, vectors)
    changes = np.empty((2, m // 2, m))
    free, pivots = vectors < 0, np.zeros(len(ends), dtype=np.int64)
    reached = pivots > 0
    for i, end in enumerate(ends):
        free[i], pivots[i], reached[i] = _follow(seen, start, end, changes)
        if i == FIRST and 2 * np.count_nonzero(reached) < FIRST:
            break
    return free, pivots, reached


def _follow(seen: Tableau, start: Array, end: Array, changes: Array) -> tuple[Array, int, bool]:
    """Exchange what reaches zero between two values, `end + t (start - end)` for t from 1 to 0."""
    now, end, slope = Changing(seen, changes), end.copy(), start - end
    for count in range(changes.shape[1]):
        times = np.where(slope > 0, -end / slope, 0.0)
        k = int(times.argmax())
        if not times[k] > SIGN_TOL:
            return now.free, count, bool(np.isfinite(times[k]))
        column, pivot = now.column(k)
        if not pivot > 0:
            break
        at, rate = end[k] / pivot, slope[k] / pivot
        end -= at * column
        slope -= rate * column
        end[k], slope[k] = -at, -rate
        now.exchange(k, column)
    return now.free, changes.shape[1], False


def solve_seen(seen: Tableau, free: Array, right: Array) -> Array:
    """Solve `Q_FF x_F = b_F` for problems `(N, m)` by systems of what their supports differ in."""
    x = values(seen, np.where(free, -right, 0.0))
    for index, changed in enumerate(free != seen.free):
        k = np.flatnonzero(changed)
        rows, signs = seen.matrix[k], np.where(seen.free == seen.free[k, None], 1.0, -1.0)
        part = _solve(rows[:, k], -x[index, k])
        x[index] += product(part[None], rows * signs)[0]
        x[index, k] = part
    return np.where(free, x, 0.0)


def _solve(matrix: Array, right: Array) -> Array:
    """Solve one system; not-a-number where there is no solution."""
    solved, info = torch.linalg.solve_ex(torch.from_numpy(matrix), torch.from_numpy(right))
    return solved.numpy() if not int(info) else np.full_like(right, np.nan)


def drive(matrix: Array, vector: Array, near: Array, most: int) -> tuple[Array, Array, int]:
    """Solve one problem by the driving-variable method, from a support `(m,)` that is near.

    It gives up after `most` pivots for each unknown.

    Returns:
        `(z, support, pivots)`; `z` is not-a-number if it fails.
    """
    m, pivots = len(vector), 0
    seen = tableau(matrix, _positive(matrix, vector, near.copy()))
    now, value = Changing(seen, np.empty((2, FOLDED, m))), values(seen, vector[None])[0]
    while pivots < most * (m + 1):
        pinned = np.where(now.free, 0.0, value)
        k, driven = int(pinned.argmin()), 0.0
        if pinned[k] >= -SIGN_TOL * (1 + np.where(now.free, value, 0.0).max()):
            return np.where(now.free, value, 0.0), now.free, pivots
        column, slope = now.column(k)
        i, step = _first_at_zero(now.free, value, column)
        while step * slope < -value[k] and pivots < most * (m + 1):
            value += column * step
            value[i], driven = 0.0, driven + step
            now.exchange(i, now.column(i)[0])
            pivots += 1
            column, slope = now.column(k)
            i, step = _first_at_zero(now.free, value, column)
        if not slope > 0:
            break
        at = value[k] / slope
        value -= column * at
        value[k] = driven - at
        now.exchange(k, column)
        pivots += 1
    return np.full(m, np.nan), now.free, pivots


def _first_at_zero(free: Array, value: Array, column: Array) -> tuple[int, float]:
    """Return which unknown of the support a step along a column brings to zero, and the step."""
    falling = free & (column < -SIGN_TOL)
    steps = np.where(falling, value / np.where(falling, -column, 1.0), np.inf)
    i = int(steps.argmin())
    return i, steps[i]


def _positive(matrix: Array, vector: Array, free: Array) -> Array:
    """Take out of a support what is negative on it, until nothing is."""
    while free.any():
        kept = np.flatnonzero(free)
        negative = ~(_solve(matrix[np.ix_(kept, kept)], -vector[kept]) >= 0)
        if not negative.any():
            break
        free[kept[negative]] = False
    return free
