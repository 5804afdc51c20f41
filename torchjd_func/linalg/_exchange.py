"""Block principal pivoting: non-negative quadratic programs with independent rows, on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from torchjd_func._host import Array
from torchjd_func.linalg._supports import LARGEST, SIGN_TOL, cut_out, largest, push

# A solution with a general right-hand side that is this large marks dependent rows too.
PROBE_LIMIT = 1e11
# Exchanges without improvement before it gives up.
PATIENCE = 3
# Systems are solved whole up to this size, or in a batch of this many multiplications; beyond, the
# support is cut out.
SMALL, LIGHT = 24, 1_000_000
# From this many systems on torch solves them faster than numpy.
MANY = 256


def exchange(
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
        size = largest(signed)
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
            return found[:, :, 0], largest(found[:, :, 1]) < PROBE_LIMIT
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
