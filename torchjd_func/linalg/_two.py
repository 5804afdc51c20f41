"""Two unknowns, in closed form: no batch, no array, a tenth of the time."""

from __future__ import annotations

import numpy as np

from torchjd_func._host import Array

# The determinant, relative to the product of the diagonal, below which Cramer's rule loses digits.
REGULAR = 1e-4


def solve_two(matrix: Array, vectors: Array) -> Array | None:
    """Return the solutions `(N, 2)` for one matrix, or `None` if any of them takes more care."""
    (a, b), (_, c) = matrix.tolist()
    found = [_solve(a, b, c, first, second) for first, second in vectors.tolist()]
    return None if None in found else np.array(found)


def _solve(a: float, b: float, c: float, first: float, second: float) -> tuple | None:
    """Try the four supports; not-a-number fails every comparison."""
    if first >= 0 and second >= 0:
        return 0.0, 0.0
    determinant = a * c - b * b
    if not (a > 0 and c > 0 and determinant > REGULAR * a * c):
        return None
    if first < 0 and second - b / a * first >= 0:
        return -first / a, 0.0
    if second < 0 and first - b / c * second >= 0:
        return 0.0, -second / c
    x, y = (b * second - c * first) / determinant, (b * first - a * second) / determinant
    return (x, y) if 0 < x < np.inf and 0 < y < np.inf else None
