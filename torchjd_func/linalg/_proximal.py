"""Non-negative quadratic programs with dependent rows, on the CPU: a ridge that is taken back."""

from __future__ import annotations

import numpy as np

from torchjd_func._host import Array
from torchjd_func.linalg._active_set import active_set
from torchjd_func.linalg._exchange import exchange
from torchjd_func.linalg._supports import EXACT, SIGN_TOL, largest, residual

# What is added to a unit diagonal while rows are dependent, and centres of the last.
RIDGES, CENTRES = (0.1, 0.01, 1e-3, 1e-6), 6
# An unknown this small, of the largest, may be zero.
TIE = 1e-9


def proximal_point(
    matrices: Array, which: Array, vectors: Array, rounding: Array
) -> tuple[Array, Array, Array, Array]:
    """Solve where rows are dependent: a falling ridge makes them independent, and is taken back.

    The last ridge pulls towards a centre: first to zero, so that of many solutions the one of
    least norm is found, whatever the order of the rows; then to what was found.

    R. T. Rockafellar, Monotone operators and the proximal point algorithm, SIAM J. Control and
    Optimization 14, 1976.

    Returns:
        `(z, support, iterations, done)`.
    """
    last = max(RIDGES[-1], rounding.max())
    z, free, iterations, identity = 0 * vectors, vectors < -SIGN_TOL, 0, np.eye(vectors.shape[1])
    for ridge in (*RIDGES[:-1], last):
        z, free, extra = _regular(matrices + ridge * identity, which, vectors, z, free)
        iterations = iterations + extra
    found = residual(matrices, which, vectors, z)
    for _ in range(CENTRES):
        settled = (found <= np.maximum(EXACT, rounding)).all()
        centred = vectors - last * z
        z, free, extra = _regular(matrices + last * identity, which, centred, z, free)
        iterations, found = iterations + extra, residual(matrices, which, vectors, z)
        if settled:  # and refined once more: a direction is as small as the root of its square
            break
    # What rounding left of unknowns that are zero, goes if the conditions hold as well without.
    zero = z <= TIE * largest(z)[:, None]
    pinned = np.where(zero, 0.0, z)
    tied = residual(matrices, which, vectors, pinned) <= np.maximum(EXACT, found)
    z, free = np.where(tied[:, None], pinned, z), free & ~(zero & tied[:, None])
    return z, free, iterations, found <= np.maximum(SIGN_TOL, rounding)


def _regular(
    matrices: Array, which: Array, vectors: Array, z: Array, free: Array
) -> tuple[Array, Array, Array]:
    """Solve where rows are independent, from a solution of a similar problem."""
    found, free, iterations, done = exchange(matrices, which, vectors, free)
    left = np.flatnonzero(~done)
    if len(left):
        near = active_set(matrices, which[left], vectors[left], z[left])
        found[left], free[left], extra = near
        iterations[left] += extra
    return found.clip(min=0), free, iterations
