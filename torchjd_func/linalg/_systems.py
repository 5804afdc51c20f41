"""Systems on the support of a problem: `N` problems share `P` matrices, `matrices[which]`."""

from __future__ import annotations

import numpy as np
import torch

from torchjd_func._host import Array

# Systems are solved whole up to this size, or in a batch of this many multiplications; beyond, the
# support is cut out.
SMALL, LIGHT = 24, 1_000_000
# From this many systems on torch solves them faster than numpy.
MANY = 256
# Numbers in the largest batch of systems that are cut out.
BLOCK = 2_000_000
# A pivot of the Cholesky factor (of a unit diagonal) below this marks a dependent row.
RANK_TOL = 1e-12
# Largest relative residual of the conditions of a solution that is called converged, or twice the
# ridge if that is more.
KKT_TOL = 1e-8


def largest(x: Array) -> Array:
    """Return `max|x|` of each row."""
    return np.maximum.reduce(np.abs(x), axis=1, initial=0.0)


def product(a: Array, b: Array) -> Array:
    """Multiply by torch, whose threads the user sets: numpy's wait for busy cores."""
    return torch.mm(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def push(matrices: Array, which: Array, z: Array) -> Array:
    """Return `Q z` for each problem."""
    if len(matrices) == 1:
        return product(z, matrices[0])
    if z.size * z.shape[1] <= BLOCK or 4 * len(matrices) > len(z):
        return np.matmul(matrices[which], z[:, :, None])[:, :, 0]
    out = np.empty_like(z)
    for index, matrix in enumerate(matrices):
        out[which == index] = product(z[which == index], matrix)
    return out


def residual(matrices: Array, which: Array, vectors: Array, z: Array) -> Array:
    """Return the relative residual of the conditions of optimality, for each problem."""
    return largest(np.minimum(z, push(matrices, which, z) + vectors)) / (1 + largest(z))


def complementary(
    matrices: Array, which: Array, right: Array, free: Array, minus: Array
) -> tuple[Array, Array]:
    """Return `x_F` and the slopes of the others, in one array, none negative at a solution.

    Args:
        matrices: `(P, m, m)`.
        which: `(N,)`.
        right: `(N, m, 2)`: `-q`, and a vector like no other.
        free: `(N, m)`, the support.
        minus: `(m, m)`, minus the identity.

    Returns:
        The array, and the size of what solves the system for the second vector: it is blown up
        where the rows of the support are dependent.
    """
    n, m = free.shape
    if m <= SMALL or n * m**3 <= LIGHT:
        matrix = matrices if len(matrices) == 1 else matrices[which]
        # Of `Q x - y = -q`, the columns of what is not zero.
        system = np.where(free[:, None, :], matrix, minus)
        try:
            solved = _solve_each(system, right)
            return solved[:, :, 0], largest(solved[:, :, 1])
        except np.linalg.LinAlgError:
            pass
    x, independent = cut_out(matrices, which, free, right[:, :, 0])
    slope = push(matrices, which, x) - right[:, :, 0]
    return np.where(free, x, slope), np.where(independent, 0.0, np.inf)


def _solve_each(systems: Array, right: Array) -> Array:
    """Solve `(n, m, m)` systems: torch takes longer to start, and less for each."""
    if len(systems) < MANY:
        return np.linalg.solve(systems, right)
    solved, info = torch.linalg.solve_ex(torch.from_numpy(systems), torch.from_numpy(right))
    solved[info != 0] = torch.inf
    return solved.numpy()


def cut_out(matrices: Array, which: Array, free: Array, right: Array) -> tuple[Array, Array]:
    """Solve on the support by Cholesky, in systems of its size, in batches of similar size.

    Returns:
        `x`, zero off the support, and whether the rows of the support are independent.
    """
    x, independent = np.zeros_like(right), np.ones(len(right), dtype=bool)
    counts = free.sum(axis=1)
    order = np.argsort(counts, kind="stable")
    step = max(1, BLOCK // max(1, int(counts.max(initial=0))) ** 2)
    for start in range(0, len(order), step):
        block = order[start : start + step]
        part = _cut_out_block(matrices, which[block], free[block], right[block])
        x[block], independent[block] = part
    return x, independent


def _cut_out_block(matrices: Array, which: Array, free: Array, right: Array) -> tuple[Array, Array]:
    """Cut out systems of the size of the largest support; the rest of each is the identity."""
    size = int(free.sum(axis=1).max())
    if size == 0:
        return np.zeros_like(right), np.ones(len(right), dtype=bool)
    places = np.argsort(~free, axis=1, kind="stable")[:, :size]
    valid = np.take_along_axis(free, places, axis=1)
    m = free.shape[1]
    rows = (which * m)[:, None] + places
    small = matrices.take(rows[:, :, None] * m + places[:, None, :])
    small = np.where(valid[:, :, None] & valid[:, None, :], small, np.eye(size))
    reduced = np.where(valid, np.take_along_axis(right, places, axis=1), 0.0)
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(small))
    solved = torch.cholesky_solve(torch.from_numpy(reduced).unsqueeze(-1), factor).squeeze(-1)
    x = np.zeros_like(right)
    np.put_along_axis(x, places, np.where(valid, solved.numpy(), 0.0), axis=1)
    return x, _independent(factor, info)


def singular(matrices: Array) -> Array:
    """Say which matrices of unit diagonal have dependent rows."""
    return ~_independent(*torch.linalg.cholesky_ex(torch.from_numpy(matrices)))


def _independent(factor: torch.Tensor, info: torch.Tensor) -> Array:
    """Say by Cholesky factors which rows are independent."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return ((info == 0) & (pivots > RANK_TOL)).numpy()
