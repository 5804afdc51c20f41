"""Non-negative quadratic programs on the CPU: a search for the support that branches on values.

    argmin_{z >= 0} z'Qz/2 + q'z   <=>   z >= 0,  y = Qz + q >= 0,  z'y = 0

Block principal pivoting from a guess; where rows are dependent the proximal point method, and
where that fails too, an active set. `N` problems share `P` matrices: `i` has `matrices[which[i]]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from torchjd_func._host import Array
from torchjd_func.linalg._active_set import active_set
from torchjd_func.linalg._exchange import SMALL, exchange
from torchjd_func.linalg._proximal import proximal_point
from torchjd_func.linalg._supports import (
    KKT_TOL,
    LARGEST,
    RANK_TOL,
    SIGN_TOL,
    cut_out,
    largest,
    push,
    residual,
)
from torchjd_func.linalg._two import solve_two

# Divides by this instead of by zero.
TINY = np.finfo(np.float64).tiny
# Guessing supports pays if the products of all matrices with a vector take this many
# multiplications.
HEAVY = 30_000
# Steps at most, and between two looks at whether the guess still changes.
GUESS_STEPS, GUESS_CHECKS = 60, 10
# Negative eigenvalues show a part of what rounding did.
ROUNDINGS = 4


class Answer(NamedTuple):
    """What was found for each of `N` problems."""

    value: Array  # (N, m)
    support: Array  # (N, m) bool
    converged: Array  # (N,) bool
    iterations: Array  # (N,) int64: linear systems solved
    fallback: Array  # (N,) bool: the exact path answered


@np.errstate(all="ignore")  # what is not finite is said in the answer
def solve(matrices: Array, which: Array, vectors: Array, solver: str) -> Answer:
    """Scale to a unit diagonal and `max|q| = 1`, search, and scale back."""
    if solver == "auto" and vectors.min(initial=0.0) >= 0 and np.isfinite(matrices).all():
        return _nothing_to_do(vectors)
    if solver == "auto" and vectors.size <= 4 and vectors.shape[1] == 2:
        value = solve_two(matrices[which[0]], vectors) if len(matrices) == 1 else None
        if value is not None:
            ones = np.ones(len(value), dtype=np.int64)
            return Answer(value, value > 0, ones > 0, ones, ones < 0)
    diagonal = matrices.diagonal(axis1=1, axis2=2)
    scales = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    unit = matrices * (scales[:, :, None] * scales[:, None, :])
    scale = scales if len(scales) == 1 else scales[which]
    linear = vectors * scale
    size = np.maximum(largest(linear), TINY)[:, None]
    linear /= size
    z, support, iterations, fallback, rounding = _search(unit, which, linear, solver)
    left = residual(unit, which, linear, z)
    converged = (left <= KKT_TOL + rounding) & (largest(z) < LARGEST)
    value = z * (scale * size)
    if not converged.all():  # not-a-number spreads from the input
        value += 0.0 * left[:, None]
    return Answer(value, support, converged, iterations, fallback)


def _nothing_to_do(vectors: Array) -> Answer:
    """Return zero, which is the answer where no slope is negative: nothing conflicts."""
    n = len(vectors)
    true, zero = np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64)
    return Answer(0 * vectors, np.zeros(vectors.shape, dtype=bool), true, zero, ~true)


def _search(
    matrices: Array, which: Array, vectors: Array, solver: str
) -> tuple[Array, Array, Array, Array, Array]:
    """Find the solutions; exact paths take what the fast one leaves.

    Returns:
        `(z, support, iterations, fallback, rounding)`, the last in the entries of the matrix.
    """
    if solver != "auto":
        support = _reference(matrices, which, vectors, solver)
        z, _ = cut_out(matrices, which, support, -vectors)
        ones = np.ones(len(z), dtype=np.int64)
        return z.clip(min=0), support, ones, ones.astype(bool), np.zeros(len(z))
    n, m = vectors.shape
    guess = vectors < -SIGN_TOL
    if m > SMALL and n * m**2 > HEAVY and guess.any():
        guess = _guess(matrices, which, vectors)
    z, support, iterations, done = exchange(matrices, which, vectors, guess)
    left, rounding = np.flatnonzero(~done), np.zeros(n)
    if len(left):
        used, own = np.unique(which[left], return_inverse=True)
        rounding[left] = ROUNDINGS * _negative(matrices[used])[own]
        near = proximal_point(matrices[used], own, vectors[left], rounding[left])
        z[left], support[left], extra, settled = near
        iterations[left] += extra
        left = left[~settled]
    if len(left):
        z[left], support[left], extra = active_set(matrices, which[left], vectors[left])
        iterations[left] += extra
    return z.clip(min=0), support, iterations, ~done, rounding


def _negative(matrices: Array) -> Array:
    """Return the size of the negative eigenvalues, `(P,)`: a Gramian has them from rounding."""
    finite = np.isfinite(matrices).all(axis=(1, 2), keepdims=True)
    return -np.linalg.eigvalsh(np.where(finite, matrices, 0.0))[:, 0].clip(max=0)


def _guess(matrices: Array, which: Array, vectors: Array) -> Array:
    """Guess supports by a few accelerated projected gradient steps: products of matrices only."""
    rows = np.abs(matrices).sum(axis=2).max(axis=1)  # no eigenvalue is larger
    probe = np.ones(matrices.shape[:2])
    for _ in range(6):
        probe = np.matmul(matrices, probe[:, :, None])[:, :, 0]
        probe = probe / np.maximum(np.linalg.norm(probe, axis=1, keepdims=True), 1e-300)
    image = np.matmul(matrices, probe[:, :, None])[:, :, 0]
    curvature = np.minimum(1.2 * np.linalg.norm(image, axis=1), rows)[which, None]
    rate = 1 / np.maximum(curvature, TINY)
    z = ahead = np.zeros_like(vectors)
    guess, place = z > 0, np.arange(len(z))
    momentum, before = np.ones((len(z), 1)), guess
    for step in range(1, GUESS_STEPS + 1):
        slope = push(matrices, which, ahead) + vectors
        stepped = np.maximum(ahead - rate * slope, 0)
        move = stepped - z
        # Momentum that leads uphill is dropped.
        # B. O'Donoghue, E. Candes, Adaptive restart for accelerated gradient schemes, 2015.
        momentum[np.add.reduce(slope * move, axis=1) > 0] = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = stepped + (momentum - 1) / following * move
        z, momentum = stepped, following
        if step % GUESS_CHECKS == 0:
            guess[place] = support = z > 0
            moved = (support != before).any(axis=1)
            if not moved.any():
                break
            before = support
            if 2 * np.count_nonzero(moved) <= len(place):
                place, which, vectors, rate, z, ahead, momentum, before = (
                    x[moved] for x in (place, which, vectors, rate, z, ahead, momentum, before)
                )
    return guess


def _reference(matrices: Array, which: Array, vectors: Array, solver: str) -> Array:
    """Ask a solver of qpsolvers, one problem at a time, which unknowns are positive."""
    import qpsolvers  # takes as long to import as all of this package

    ridge, zero = RANK_TOL * np.eye(vectors.shape[1]), np.zeros(vectors.shape[1])
    support = np.zeros(vectors.shape, dtype=bool)
    for index, (matrix, vector) in enumerate(zip(matrices[which], vectors, strict=True)):
        found = qpsolvers.solve_qp(matrix + ridge, vector, lb=zero, solver=solver)
        z = zero if found is None else found
        support[index] = z > np.maximum(matrix @ z + vector, 0)
    return support
