"""Systems on the support of a problem: `N` problems share `P` matrices, `matrices[which]`."""

from __future__ import annotations

import numpy as np
import torch

from torchjd_func._host import Array
from torchjd_func.linalg._gramian import sure_inverse

# Largest relative KKT residual of a solution that is called converged.
KKT_TOL = 1e-8
# Signs are told apart relative to rounding in `Qz + q`, whose terms grow with `z`.
SIGN_TOL = 1e-12
# A pivot of the Cholesky factor (of a unit diagonal) below this marks a dependent row.
RANK_TOL = 1e-12
# An unknown this large (of a unit diagonal, `max|q| = 1`) is the rounding of an infinite one.
LARGEST = 1e8
# With this condition at most, and so many right-hand sides, a matrix is worth inverting.
CONDITION, MANY = 1e6, 32
# A residual of this size (of `max|q| = 1`) is not worth another round.
EXACT = 1e-14
# Numbers in the largest batch of cut-out systems.
BLOCK = 2_000_000


def largest(x: Array) -> Array:
    """Return `max|x|` of each row."""
    return np.maximum.reduce(np.abs(x), axis=1, initial=0.0)


def push(matrices: Array, which: Array, z: Array) -> Array:
    """Return `Q z` for each problem."""
    if len(matrices) == 1:
        return z @ matrices[0]
    if z.size * z.shape[1] <= BLOCK or 4 * len(matrices) > len(z):
        return np.matmul(matrices[which], z[:, :, None])[:, :, 0]
    out = np.empty_like(z)
    for index, matrix in enumerate(matrices):
        out[which == index] = z[which == index] @ matrix
    return out


def residual(matrices: Array, which: Array, vectors: Array, z: Array) -> Array:
    """Return the relative residual of the conditions of optimality, for each problem."""
    return largest(np.minimum(z, push(matrices, which, z) + vectors)) / (1 + largest(z))


def cut_out(matrices: Array, which: Array, free: Array, right: Array) -> tuple[Array, Array]:
    """Solve on the support, by Cholesky: in systems of its size, or of what it leaves out.

    Returns:
        `x`, zero off the support, and whether the rows of the support are independent.
    """
    large = 3 * free.sum(axis=1) > 2 * free.shape[1]
    many = len(matrices) == 1 and large.sum() >= MANY
    inverse = sure_inverse(matrices[0], 1 / CONDITION) if many else None
    if inverse is None:
        return _in_blocks(matrices, which, free, right)
    x, independent, small = np.zeros_like(right), np.ones(len(right), dtype=bool), ~large
    x[large] = _left_out(matrices[0], inverse, free[large], right[large])
    x[small], independent[small] = _in_blocks(matrices, which[small], free[small], right[small])
    return x, independent


def _left_out(matrix: Array, inverse: Array, free: Array, right: Array) -> Array:
    """Solve on large supports by small systems off them: `x = H (b + l)` with `x` zero there."""
    x, which = np.zeros_like(right), np.zeros(len(right), dtype=int)
    for _ in range(2):  # the second round refines the first, where that is not rounding
        left = np.where(free, right - x @ matrix, 0.0)
        if np.abs(left).max(initial=0.0) <= EXACT:
            break
        whole = left @ inverse
        beyond, _ = _in_blocks(inverse[None], which, ~free, -whole)
        x = np.where(free, x + whole + beyond @ inverse, 0.0)
    return x


def _in_blocks(matrices: Array, which: Array, free: Array, right: Array) -> tuple[Array, Array]:
    """Solve on the support, in systems of its size, in batches of similar size."""
    x, independent = np.zeros_like(right), np.ones(len(right), dtype=bool)
    counts = free.sum(axis=1)
    order = np.argsort(counts, kind="stable")
    step = max(1, BLOCK // max(1, int(counts.max(initial=0))) ** 2)
    for start in range(0, len(order), step):
        block = order[start : start + step]
        found = _cut_out_block(matrices, which[block], free[block], right[block])
        x[block], independent[block] = found
    return x, independent


def _cut_out_block(matrices: Array, which: Array, free: Array, right: Array) -> tuple[Array, Array]:
    """Cut out systems of the size of the largest support; the rest of each is the identity."""
    size = int(free.sum(axis=1).max())
    if size == 0:
        return np.zeros_like(right), np.ones(len(right), dtype=bool)
    places = np.argsort(~free, axis=1, kind="stable")[:, :size]
    valid = np.take_along_axis(free, places, axis=1)
    small = matrices[which[:, None, None], places[:, :, None], places[:, None, :]]
    small = np.where(valid[:, :, None] & valid[:, None, :], small, np.eye(size))
    reduced = np.where(valid, np.take_along_axis(right, places, axis=1), 0.0)
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(small))
    solved = torch.cholesky_solve(torch.from_numpy(reduced).unsqueeze(-1), factor).squeeze(-1)
    x = np.zeros_like(right)
    np.put_along_axis(x, places, np.where(valid, solved.numpy(), 0.0), axis=1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return x, ((info == 0) & (pivots > RANK_TOL)).numpy()
