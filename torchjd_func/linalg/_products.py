"""Many problems with one matrix: block exchange by products of matrices alone.

Step 2 of the method in `_pivoting.py`, with systems solved by conjugate gradients on the supports,
for all problems at once. A well-conditioned problem takes about 40 products of the matrix with a
vector, whatever its size; what takes many more is left to factorisations.
"""

from __future__ import annotations

import numpy as np

from torchjd_func._host import Array

# Problems at a time, so that they stay in the cache.
BATCH = 128
# Rounds of exchange, and products in each.
ROUNDS, PRODUCTS = 12, 60
# Residuals to which systems are solved for a guess of the support, one after another.
LOOSE = (3e-2, 1e-3, 1e-5)
# From this size on products also polish a solution faster than a factorisation; to this residual.
LARGE, POLISHED = 384, 1e-13
# Divides by at least this.
TINY = np.finfo(np.float64).tiny
# Products pay from this size on, if that of all vectors with the matrix takes so many operations.
LEAST, HEAVY = 24, 100_000


def pays(matrices: Array, vectors: Array) -> bool:
    """Say whether products are faster than factorisations."""
    n, m = vectors.shape
    return m > LEAST and n * m**2 > HEAVY * len(matrices)


def exchange_by_products(
    matrices: Array, which: Array, vectors: Array, free: Array, tol: float
) -> tuple[Array, Array, Array, Array]:
    """Find supports, and, of large problems, solutions.

    Args:
        matrices: `(P, m, m)`, of unit diagonal.
        which: `(N,)`.
        vectors: `(N, m)`, with largest entries of 1.
        free: `(N, m)`, the supports to start from.
        tol: The residual to which the conditions of optimality are to be met; at least `POLISHED`.

    Returns:
        `(z, support, iterations, done)`.
    """
    n, m = vectors.shape
    z, support = np.zeros_like(vectors), free.copy()
    rounds, done = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    levels = np.array([*LOOSE, max(tol, POLISHED)][: 4 if m > LARGE else 3])
    for index, matrix in enumerate(matrices):
        own = np.flatnonzero(which == index)
        for start in range(0, len(own), BATCH):
            part = own[start : start + BATCH]
            answer = _batch(matrix, vectors[part], free[part], levels)
            z[part], support[part], rounds[part], done[part] = answer
    return z, support, rounds, done & (m > LARGE)


def _batch(
    matrix: Array, vectors: Array, free: Array, levels: Array
) -> tuple[Array, Array, Array, Array]:
    """Exchange wrong signs, tightening the systems while there are none; what is done leaves."""
    n = len(vectors)
    out, support, done = np.zeros_like(vectors), free.copy(), np.zeros(n, dtype=bool)
    rounds, place = np.zeros(n, dtype=np.int64), np.arange(n)
    z, slope, level = out.copy(), vectors.copy(), np.zeros(n, dtype=np.int64)
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
        gone = np.where(free, 0.0, z)
        if gone.any():
            z -= gone
            slope -= gone @ matrix
    return np.where(done[:, None] & support, out, 0.0), support, rounds, done


def _conjugate_gradients(matrix: Array, z: Array, slope: Array, free: Array, tol: Array) -> Array:
    """Solve `Qz + q = slope = 0` on the supports, in place; return which systems are solved."""
    left = np.where(free, slope, 0.0)
    square, limit = _dot(left, left), tol * tol
    step = -left
    for _ in range(PRODUCTS):
        if (square <= limit).all():
            break
        pushed = step @ matrix
        rate = (square / (_dot(step, pushed) + TINY))[:, None]
        z += rate * step
        pushed *= rate
        slope += pushed
        np.multiply(slope, free, out=left)
        before, square = square, _dot(left, left)
        step *= (square / (before + TINY))[:, None]
        step -= left
    return square <= limit


def _dot(a: Array, b: Array) -> Array:
    """Return the inner product of each row."""
    return np.einsum("ij,ij->i", a, b)
