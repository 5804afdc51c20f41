"""Non-negative quadratic programs on the CPU: a search for the support that branches on values.

    argmin_{z >= 0} z'Qz/2 + q'z   <=>   z >= 0,  y = Qz + q >= 0,  z'y = 0

Guess which unknowns are positive, solve for them, and exchange all unknowns of the wrong sign,
until there is none. `N` problems share `P` matrices: problem `i` has `matrices[which[i]]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import qpsolvers
import torch

from torchjd_func._host import Array
from torchjd_func.linalg._active_set import active_set
from torchjd_func.linalg._supports import KKT_TOL, LARGEST, RANK_TOL, SIGN_TOL, cut_out, push
from torchjd_func.linalg._two import solve_two

# A solution with a general right-hand side that is this large marks dependent rows too.
PROBE_LIMIT = 1e11
# Divides by this instead of by zero.
TINY = np.finfo(np.float64).tiny
# Exchanges without improvement before the fast path gives up.
PATIENCE = 3
# Systems are solved whole up to this size, or in a batch of this many multiplications; beyond, the
# support is cut out.
SMALL, LIGHT = 24, 1_000_000
# From this many systems on torch solves them faster than numpy.
MANY = 256
# Guessing supports pays if the products of all matrices with a vector take this many
# multiplications.
HEAVY = 30_000
GUESS_STEPS = 20


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
    size = np.maximum(_largest(linear), TINY)[:, None]
    linear /= size
    z, support, iterations, fallback = _search(unit, which, linear, solver)
    residual = _largest(np.minimum(z, push(unit, which, z) + linear))
    longest = np.maximum.reduce(z, axis=1, initial=0.0)
    converged = (residual <= KKT_TOL * (1 + longest)) & (longest < LARGEST)
    value = z * (scale * size)
    if not converged.all():  # not-a-number spreads from the input
        value += 0.0 * residual[:, None]
    return Answer(value, support, converged, iterations, fallback)


def _largest(x: Array) -> Array:
    """Return `max|x|` of each row."""
    return np.maximum.reduce(np.abs(x), axis=1, initial=0.0)


def _nothing_to_do(vectors: Array) -> Answer:
    """Return zero, which is the answer where no slope is negative: nothing conflicts."""
    n = len(vectors)
    true, zero = np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64)
    return Answer(0 * vectors, np.zeros(vectors.shape, dtype=bool), true, zero, ~true)


def _search(
    matrices: Array, which: Array, vectors: Array, solver: str
) -> tuple[Array, Array, Array, Array]:
    """Find `(z, support, iterations, fallback)`; the exact path takes what the fast one leaves."""
    if solver != "auto":
        support = _reference(matrices, which, vectors, solver)
        z, _ = cut_out(matrices, which, support, -vectors)
        ones = np.ones(len(z), dtype=np.int64)
        return z.clip(min=0), support, ones, ones.astype(bool)
    n, m = vectors.shape
    guess = vectors < -SIGN_TOL
    if m > SMALL and n * m**2 > HEAVY and guess.any():
        guess = _guess(matrices, which, vectors)
    z, support, iterations, done = _exchange(matrices, which, vectors, guess)
    left = np.flatnonzero(~done)
    if len(left):
        z[left], support[left], extra = active_set(matrices, which[left], vectors[left])
        iterations[left] += extra
    return z.clip(min=0), support, iterations, ~done


def _guess(matrices: Array, which: Array, vectors: Array) -> Array:
    """Guess supports by a few accelerated projected gradient steps: products of matrices only."""
    rows = np.abs(matrices).sum(axis=2).max(axis=1)  # no eigenvalue is larger
    probe = np.ones(matrices.shape[:2])
    for _ in range(6):
        probe = np.matmul(matrices, probe[:, :, None])[:, :, 0]
        probe = probe / np.maximum(np.linalg.norm(probe, axis=1, keepdims=True), 1e-300)
    largest = np.matmul(matrices, probe[:, :, None])[:, :, 0]
    curvature = np.minimum(1.2 * np.linalg.norm(largest, axis=1), rows)[which, None]
    z = np.zeros_like(vectors)
    ahead, momentum = z, 1.0
    for _ in range(GUESS_STEPS):
        slope = push(matrices, which, ahead) + vectors
        stepped = np.maximum(ahead - slope / np.maximum(curvature, 1e-300), 0)
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = stepped + (momentum - 1) / following * (stepped - z)
        z, momentum = stepped, following
    return z > 0


def _exchange(
    matrices: Array, which: Array, vectors: Array, free: Array
) -> tuple[Array, Array, Array, Array]:
    """Block principal pivoting: flip all indices of the wrong sign at once until there is none.

    Few steps on independent rows; may cycle on dependent ones. Solved and failed problems leave.

    J. J. Judice, F. M. Pires, A block principal pivoting algorithm for large-scale strictly
    monotone linear complementarity problems, Computers & OR 21, 1994.

    Returns:
        `(z, support, iterations, done)`.
    """
    n, m = vectors.shape
    z, support = np.zeros((n, m)), np.zeros((n, m), dtype=bool)
    iterations, done = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    fewest, patience, rounds = np.full(n, m + 1), np.full(n, PATIENCE), 0
    place: Array = np.arange(n)
    minus, right = -np.eye(m), np.empty((n, m, 2))
    # A second right-hand side, like no other, is blown up by a system that is hardly regular.
    right[:, :, 0], right[:, :, 1] = -vectors, np.cos(np.arange(m) ** 2)
    while True:
        signed, independent = _complementary(matrices, which, right, free, minus)
        size = _largest(signed)
        wrong = signed < -SIGN_TOL * (1 + size)[:, None]
        count = np.add.reduce(wrong, axis=1)
        independent = independent & (size < LARGEST)
        stay = independent & (count > 0)
        rounds += 1
        if rounds > PATIENCE:
            patience = np.where(count < fewest, PATIENCE, patience - 1)
            fewest = np.minimum(fewest, count)
            stay = stay & (patience > 0)
        left = np.count_nonzero(stay)
        if not left and len(place) == n:
            iterations += rounds
            return np.where(free, signed, 0.0), free, iterations, independent & (count == 0)
        if 2 * left <= len(place):
            z[place], support[place] = np.where(free, signed, 0.0), free
            iterations[place], done[place] = rounds, independent & (count == 0)
            if not left:
                return z, support, iterations, done
            place, which, right, free, wrong = (x[stay] for x in (place, which, right, free, wrong))
            fewest, patience = fewest[stay], patience[stay]
        free = free ^ wrong


def _complementary(
    matrices: Array, which: Array, right: Array, free: Array, minus: Array
) -> tuple[Array, Array]:
    """Return `x_F` and the slopes of the others, in one array, none negative at a solution.

    Returns:
        The array, and whether the rows of the support are independent.
    """
    n, m = free.shape
    if m <= SMALL or n * m**3 <= LIGHT:
        matrix = matrices if len(matrices) == 1 else matrices[which]
        # Of `Q x - y = -q`, the columns of what is not zero.
        system = np.where(free[:, None, :], matrix, minus)
        try:
            found = _solve_each(system, right)
            return found[:, :, 0], _largest(found[:, :, 1]) < PROBE_LIMIT
        except np.linalg.LinAlgError:
            pass
    x, independent = cut_out(matrices, which, free, right[:, :, 0])
    return np.where(free, x, push(matrices, which, x) - right[:, :, 0]), independent


def _solve_each(systems: Array, right: Array) -> Array:
    """Solve `(n, m, m)` systems: torch takes longer to start, and less for each."""
    if len(systems) < MANY:
        return np.linalg.solve(systems, right)
    found, info = torch.linalg.solve_ex(torch.from_numpy(systems), torch.from_numpy(right))
    found[info != 0] = torch.inf
    return found.numpy()


def _reference(matrices: Array, which: Array, vectors: Array, solver: str) -> Array:
    """Ask a solver of qpsolvers, one problem at a time, which unknowns are positive."""
    ridge, zero = RANK_TOL * np.eye(vectors.shape[1]), np.zeros(vectors.shape[1])
    support = np.zeros(vectors.shape, dtype=bool)
    for index, (matrix, vector) in enumerate(zip(matrices[which], vectors, strict=True)):
        found = qpsolvers.solve_qp(matrix + ridge, vector, lb=zero, solver=solver)
        z = zero if found is None else found
        support[index] = z > np.maximum(matrix @ z + vector, 0)
    return support
