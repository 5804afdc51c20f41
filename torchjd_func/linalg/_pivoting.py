"""Non-negative quadratic programs on the host: numpy, which may branch on values.

    argmin_{z >= 0} z'Qz/2 + q'z   <=>   z >= 0,  y = Qz + q >= 0,  z'y = 0

The method, in words. On a device a kernel does the same for each problem, but with the ridge of
step 3 from the start; supports too large for one are found by `_conjugate` or `_interior`.

1. Scale the unknowns so that the diagonal of Q is one, and q so that its largest entry is one.
2. Block exchange: free the indices where q is negative, solve `Q_FF z_F = -q_F`, exchange all
   indices where z or y is negative, and so on until there are none. If the rows of the support are
   independent and z is of moderate size, that is the solution.
3. Otherwise rows are dependent, or nearly, and z would be a quotient of roundings: add a ridge r of
   the size of the rounding of Q to its diagonal. The optimum `v = u + z` of a projection of `J'u`
   (`q = Qu`) then has `v'(Q + r)v <= u'(Q + r)u` and `y >= -r z`: `J'v` is not longer than `J'u`,
   and no row conflicts with it by more than `sqrt(r) |J'u|`, whatever the rank. Of many solutions
   it is that of least norm. Block exchange starts from the support for a larger ridge. First, many
   problems with one matrix are reached from one in their middle, see `_tableau.py`.
4. Where block exchange cycles, free one index at a time, from the part of the support that it came
   to where z is positive, and drive it up to its own minimum, exchanging what reaches zero on the
   way: finite where Q + r is definite.
5. Refine on the support towards the solution without a ridge, only while a step halves the residual
   of the conditions and changes no sign.

J. J. Judice, F. M. Pires, A block principal pivoting algorithm for large-scale strictly monotone
linear complementarity problems, Computers & OR 21, 1994. R. W. Cottle, G. B. Dantzig, Complementary
pivot theory of mathematical programming, Linear Algebra and its Applications 1, 1968.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torchjd_func._host import Array
from torchjd_func.linalg._products import guess, pays, polish
from torchjd_func.linalg._systems import (
    KKT_TOL,
    SMALL,
    complementary,
    cut_out,
    largest,
    push,
    residual,
)
from torchjd_func.linalg._tableau import (
    SIGN_TOL,
    Tableau,
    drive,
    probe_of,
    solve_seen,
    supports,
    tableau,
)

# Exchanges without improvement before block exchange gives up.
PATIENCE = 3
# Pivots of a unit diagonal, over the ridge, below which rows count as dependent on a device.
DEPENDENT_PIVOT = 1e3
# Ridges (of a unit diagonal) whose supports lead to that for the last.
LEADING = (0.1, 0.03, 0.01, 3e-3, 1e-3)
# Steps of refinement, and the sign that they may change.
REFINEMENTS, CHANGED = 3, 1e-13
# A larger ridge, for the supports of as many problems that are left; the numbers of a tableau with
# which rounding spoils pivots; the unknowns from which on lines from a middle pay.
WIDE, MANY, BLURRED, LINES = 1e-6, 8, 1e6, 40
# Pivots for each unknown before the driving-variable method gives up, from a support that is near
# and from the empty one.
ENOUGH, PIVOTS = 4, 40
# An unknown this small, of the largest, may be zero; a residual this small is rounding.
TIED, EXACT = 1e-9, 1e-14

Solve = Callable[[Array, Array, Array], Array]  # of rows of a batch, supports and vectors


def regular(
    matrices: Array, which: Array, vectors: Array, ridge: float
) -> tuple[Array, Array, Array, Array]:
    """Solve without a ridge what it would not change but by rounding.

    Returns:
        `(z, support, iterations, done)`.
    """
    blown, size = 0.1 / ridge, 0.1 / ridge**0.5
    free = vectors < -SIGN_TOL
    if not pays(matrices, vectors):
        return exchange(matrices, which, vectors, free, blown, size)
    free, iterations, near = guess(matrices, which, vectors, free)
    z, done = np.zeros_like(vectors), near & False
    rows = np.flatnonzero(near)
    part = polish(matrices, which[rows], vectors[rows], free[rows], ridge / 100)
    z[rows], free[rows], rounds, done[rows] = part
    iterations[rows] += rounds
    done &= largest(z) < size
    left = np.flatnonzero(~done & (near | ~share(matrices, vectors[~near])))
    if len(left):
        part = exchange(matrices, which[left], vectors[left], free[left], blown, size)
        z[left], free[left], extra, done[left] = part
        iterations[left] += extra
    return z, free, iterations, done


def share(matrices: Array, vectors: Array) -> bool:
    """Say whether problems are many with one matrix, and so large that lines to them pay."""
    return len(matrices) == 1 and len(vectors) >= MANY and vectors.shape[1] > LINES


def ridged(
    matrices: Array, which: Array, vectors: Array, ridge: float
) -> tuple[Array, Array, Array]:
    """Solve with a ridge, then take it back as far as that is sure.

    Returns:
        `(z, support, iterations)`.
    """
    free, iterations = vectors < -SIGN_TOL, np.zeros(len(vectors), dtype=np.int64)
    for amount in LEADING:
        if pays(matrices, vectors):
            free, rounds, _ = guess(matrices, which, vectors, free, amount)
        else:
            _, free, rounds, _ = _with(amount, matrices, which, vectors, free)
        iterations += rounds
    z, free, rounds = _settled(matrices, which, vectors, ridge, free)
    return z, free, iterations + rounds


def _settled(
    matrices: Array, which: Array, vectors: Array, ridge: float, near: Array
) -> tuple[Array, Array, Array]:
    """Solve from supports that are near.

    Returns:
        `(z, support, iterations)`.
    """
    z, free, iterations, done = _with(ridge, matrices, which, vectors, near)
    definite = matrices + ridge * np.eye(vectors.shape[1])
    for i in np.flatnonzero(~done):
        z[i], free[i], pivots = _driven(definite[which[i]], vectors[i], near[i])
        iterations[i] += pivots

    def solve(rows: Array, free: Array, right: Array) -> Array:
        """Solve with the ridge."""
        return cut_out(definite, which[rows], free, right)[0]

    z, gap = _refined(matrices, which, vectors, z, free, solve)
    # What rounding left of unknowns that are zero, goes if the conditions hold as well without.
    tied = free & (z <= TIED * largest(z)[:, None])
    if tied.any():
        kept = free & ~tied
        pinned, left = _refined(matrices, which, vectors, np.where(kept, z, 0.0), kept, solve)
        as_well = (left <= np.maximum(gap, EXACT))[:, None]
        z, free = np.where(as_well, pinned, z), np.where(as_well, kept, free)
    return z, free, iterations


def around(matrix: Array, vectors: Array, ridge: float) -> tuple[Array, Array, Array, Array, Array]:
    """Solve many problems with one matrix from one in their middle.

    Returns:
        `(z, support, iterations, done, dependent)`.
    """
    z, free, n = np.zeros_like(vectors), vectors < 0, len(vectors)
    iterations, done, dependent = np.zeros(n, dtype=np.int64), np.zeros(n, bool), np.ones(n, bool)
    seen, middle = _middle(matrix, vectors, ridge)
    if np.abs(seen.matrix).max() < BLURRED:
        free, iterations, reached = supports(seen, middle, vectors)
        z, gap, dependent = _seen(matrix, vectors, ridge, seen, free)
        done = reached & (gap <= 2 * ridge)
    left = np.flatnonzero(~done)
    if len(left) < MANY or ridge >= WIDE:
        return z, free, iterations, done, dependent
    # Supports for a larger ridge are almost those for this one.
    seen, middle = _middle(matrix, vectors[left], WIDE)
    found, pivots, reached = supports(seen, middle, vectors[left])
    iterations[left] += pivots
    left, found = left[reached], found[reached]
    matrices, none = matrix[None], np.zeros(len(left), dtype=np.int64)
    z[left], free[left], rounds = _settled(matrices, none, vectors[left], ridge, found)
    iterations[left] += rounds
    done[left] = dependent[left] = True
    return z, free, iterations, done, dependent


def _middle(matrix: Array, vectors: Array, ridge: float) -> tuple[Tableau, Array]:
    """Return the tableau of the solution for the mean of vectors, and that."""
    middle = vectors.mean(axis=0, keepdims=True)
    middle /= largest(middle)[:, None]
    _, free, _ = ridged(matrix[None], np.zeros(1, dtype=np.int64), middle, ridge)
    return tableau(matrix + ridge * np.eye(len(matrix)), free[0]), middle[0]


def _seen(
    matrix: Array, vectors: Array, ridge: float, seen: Tableau, free: Array
) -> tuple[Array, Array, Array]:
    """Solve on supports from a tableau.

    Returns:
        `z`, the residual of the conditions, and whether rows are dependent.
    """

    def solve(rows: Array, free: Array, right: Array) -> Array:
        """Solve with the ridge."""
        return solve_seen(seen, free, right)

    none = np.zeros(len(vectors), dtype=np.int64)
    z, gap = _refined(matrix[None], none, vectors, solve_seen(seen, free, -vectors), free, solve)
    probe = solve_seen(seen, free, np.broadcast_to(probe_of(len(matrix)), free.shape))
    return z, gap, (largest(probe) >= 0.1 / ridge) | (largest(z) >= 0.1 / ridge**0.5)


def _with(
    ridge: float, matrices: Array, which: Array, vectors: Array, free: Array
) -> tuple[Array, Array, Array, Array]:
    """Exchange with a ridge."""
    definite = matrices + ridge * np.eye(vectors.shape[1])
    return exchange(definite, which, vectors, free, np.inf, np.inf)


def exchange(
    matrices: Array, which: Array, vectors: Array, free: Array, blown: float, size: float
) -> tuple[Array, Array, Array, Array]:
    """Exchange all indices of the wrong sign at once until there are none.

    Solved and failed problems leave.

    Args:
        matrices: `(P, m, m)`, of unit diagonal.
        which: `(N,)`.
        vectors: `(N, m)`, with largest entries of 1.
        free: `(N, m)`, the support to start from.
        blown: The size of the solution for a vector like no other that marks dependent rows.
        size: The size of a solution that is not trusted.

    Returns:
        `(z, support, iterations, done)`.
    """
    n, m = vectors.shape
    z, support = np.zeros((n, m)), np.zeros((n, m), dtype=bool)
    iterations, done = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    fewest, patience, rounds = np.full(n, m + 1), np.full(n, PATIENCE), 0
    place: Array = np.arange(n)
    minus, right = -np.eye(m), np.empty((n, m, 2))
    right[:, :, 0], right[:, :, 1] = -vectors, probe_of(m)
    while True:
        signed, probe = complementary(matrices, which, right, free, minus)
        longest = largest(signed)
        wrong = signed < -SIGN_TOL * (1 + longest)[:, None]
        count = np.add.reduce(wrong, axis=1)
        sound = (probe < blown) & (longest < size)
        stay = sound & (count > 0)
        rounds += 1
        if rounds > PATIENCE:
            patience = np.where(count < fewest, PATIENCE, patience - 1)
            fewest = np.minimum(fewest, count)
            stay = stay & (patience > 0)
        left = np.count_nonzero(stay)
        if not left and len(place) == n:
            iterations += rounds
            return np.where(free, signed, 0.0), free, iterations, sound & (count == 0)
        if 2 * left <= len(place) or m > SMALL:
            z[place], support[place] = np.where(free, signed, 0.0), free
            iterations[place], done[place] = rounds, sound & (count == 0)
            if not left:
                return z, support, iterations, done
            place, which, right, free, wrong = (x[stay] for x in (place, which, right, free, wrong))
            fewest, patience = fewest[stay], patience[stay]
        free = free ^ wrong


def _refined(
    matrices: Array, which: Array, vectors: Array, z: Array, free: Array, solve: Solve
) -> tuple[Array, Array]:
    """Step on the support towards the solution without a ridge.

    Returns:
        `z`, and the residual of the conditions.
    """
    z, gap = z.clip(min=0), residual(matrices, which, vectors, z.clip(min=0))
    rows = np.flatnonzero(gap > EXACT)
    for _ in range(REFINEMENTS):
        if not len(rows):
            break
        slope = push(matrices, which[rows], z[rows]) + vectors[rows]
        moved = z[rows] + solve(rows, free[rows], -slope)
        same = moved.min(axis=1) >= -CHANGED * (1 + moved.max(axis=1))
        moved = moved.clip(min=0)
        left = residual(matrices, which[rows], vectors[rows], moved)
        better = same & (left < 0.5 * gap[rows])
        z[rows[better]], gap[rows[better]] = moved[better], left[better]
        rows = rows[better & (left > EXACT)]
    return z, gap


def _driven(matrix: Array, vector: Array, near: Array) -> tuple[Array, Array, int]:
    """Drive from a support that is near or, if rounding spoils that, from the empty one."""
    z, free, pivots = drive(matrix, vector, near, ENOUGH)
    if residual(matrix[None], np.zeros(1, dtype=int), vector[None], z[None]) <= KKT_TOL:
        return z, free, pivots
    z, free, more = drive(matrix, vector, near & False, PIVOTS)
    return z, free, pivots + more
