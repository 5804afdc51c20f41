"""Many problems with one matrix: block exchange by products of matrices alone.

Step 2 of the method in `_pivoting.py`, with systems solved by conjugate gradients on the supports,
for all problems at once, in memory of the size of the matrix. Supports are found in float32, which
takes half the time, and large problems then solved in float64. A problem takes 40 to 140 products
of the matrix with a vector, whatever its size; what takes many more is left to factorisations.
"""

from __future__ import annotations

import numpy as np

from torchjd_func._host import Array
from torchjd_func.linalg._systems import product

# Problems at a time, so that they stay in the cache; of the first few, most are solved, or none is
# tried.
BATCH, FIRST = 128, 32
# Rounds of exchange, and products in each.
ROUNDS, PRODUCTS = 40, 60
# Residuals to which systems are solved for a guess of the support, one after another.
LOOSE = (3e-2, 1e-3, 1e-5)
# From this size on products also polish a solution faster than a factorisation; to this residual.
LARGE, POLISHED = 40, 1e-13
# Part of the problems that may be solved before the others go on without them.
CROWD = 0.8
# Products pay from this size on, if that of all vectors with the matrix takes so many operations.
LEAST, HEAVY = 24, 100_000


def pays(matrices: Array, vectors: Array) -> bool:
    """Say whether products are faster than factorisations."""
    n, m = vectors.shape
    return m > LEAST and n * m**2 > HEAVY * len(matrices)


def guess(
    matrices: Array, which: Array, vectors: Array, free: Array, ridge: float = 0.0
) -> tuple[Array, Array, Array]:
    """Find supports, most of them right.

    Args:
        matrices: `(P, m, m)`, of unit diagonal.
        which: `(N,)`.
        vectors: `(N, m)`, with largest entries of 1.
        free: `(N, m)`, the supports to start from.
        ridge: What is added to the diagonals.

    Returns:
        Supports, the rounds that took, and whether their systems were solved, `(N,)`.
    """
    narrow = (matrices + ridge * np.eye(vectors.shape[1])).astype(np.float32)
    _, support, rounds, done = _in_parts(narrow, which, vectors.astype(np.float32), free, LOOSE)
    return support, rounds, done


def polish(
    matrices: Array, which: Array, vectors: Array, free: Array, tol: float
) -> tuple[Array, Array, Array, Array]:
    """Solve large problems to a residual, at least `POLISHED`, from supports that are near.

    Returns:
        `(z, support, rounds, done)`; of small problems none is done.
    """
    if vectors.shape[1] <= LARGE:
        none = np.zeros(len(vectors), dtype=np.int64)
        return np.zeros_like(vectors), free, none, none > 0
    return _in_parts(matrices, which, vectors, free, (LOOSE[-1], max(tol, POLISHED)))


def _in_parts(
    matrices: Array, which: Array, vectors: Array, free: Array, residuals: tuple[float, ...]
) -> tuple[Array, Array, Array, Array]:
    """Exchange for the problems of each matrix, a few at a time."""
    z, support = np.zeros_like(vectors), free.copy()
    rounds, done = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(vectors), dtype=bool)
    for index, matrix in enumerate(matrices):
        own = np.flatnonzero(which == index)
        first = FIRST if len(own) > BATCH else 0
        for rows in np.split(own, range(first, len(own), BATCH)):
            q = vectors[rows]
            answer = _exchange(matrix, q, 0 * q, free[rows], residuals)
            z[rows], support[rows], rounds[rows], done[rows] = answer
            if 2 * np.count_nonzero(done[rows]) < len(rows) == first:
                break
    return z, support, rounds, done


def _exchange(
    matrix: Array, vectors: Array, z: Array, free: Array, residuals: tuple[float, ...]
) -> tuple[Array, Array, Array, Array]:
    """Exchange wrong signs, tightening the systems while there are none; what is done leaves."""
    n, levels = len(vectors), np.array(residuals, dtype=vectors.dtype)
    out, support, done = np.zeros_like(vectors), free.copy(), np.zeros(n, dtype=bool)
    rounds, place, level = np.zeros(n, dtype=np.int64), np.arange(n), np.zeros(n, dtype=np.int64)
    slope = vectors.copy()
    for _ in range(ROUNDS):
        solved = _conjugate_gradients(matrix, z, slope, free, levels[level])
        rounds[place] += 1
        wrong = np.where(free, z, slope) < -levels[level][:, None]
        right = ~wrong.any(axis=1)
        final = solved & right & (level == len(levels) - 1)
        support[place], out[place], done[place] = free, z, final
        stay = solved & ~final
        if not stay.any():
            break
        level = np.where(right, np.minimum(level + 1, len(levels) - 1), level)
        free = free ^ wrong
        place, z, slope, free, level = (x[stay] for x in (place, z, slope, free, level))
        gone = np.where(free, 0.0, z).astype(z.dtype)
        if gone.any():
            z -= gone
            slope -= product(gone, matrix)
    return np.where(done[:, None] & support, out, 0.0), support, rounds, done


def _conjugate_gradients(matrix: Array, z: Array, slope: Array, free: Array, tol: Array) -> Array:
    """Solve `Qz + q = slope = 0` on the supports, in place.

    What is solved leaves once it is more than a few: the slowest may take many more products.

    Returns:
        Whether each problem is solved.
    """
    solved, place = np.zeros(len(z), dtype=bool), np.arange(len(z))
    x, y, left, limit = z, slope, np.where(free, slope, 0).astype(z.dtype), tol * tol
    square, step = _dot(left, left), -left
    for _ in range(PRODUCTS):
        active = square > limit
        n = np.count_nonzero(active)
        if n <= CROWD * len(active):
            gone = place[~active]
            z[gone], slope[gone], solved[gone] = x[~active], y[~active], True
            if not n:
                return solved
            kept = (place, x, y, free, left, step, square, limit)
            place, x, y, free, left, step, square, limit = (values[active] for values in kept)
        pushed = product(step, matrix)
        rate = (square / (_dot(step, pushed) + _tiny(z)))[:, None]
        x += rate * step
        pushed *= rate
        y += pushed
        np.multiply(y, free, out=left)
        before, square = square, _dot(left, left)
        step *= (square / (before + _tiny(z)))[:, None]
        step -= left
    z[place], slope[place], solved[place] = x, y, square <= limit
    return solved


def _tiny(like: Array) -> float:
    """Return what is added to a divisor that may be zero."""
    return float(np.finfo(like.dtype).tiny)


def _dot(a: Array, b: Array) -> Array:
    """Return the inner product of each row."""
    return np.einsum("ij,ij->i", a, b)
