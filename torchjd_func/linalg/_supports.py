"""Systems on the support of a problem: `N` problems share `P` matrices, `matrices[which]`."""

from __future__ import annotations

import numpy as np
import torch

from torchjd_func._host import Array

# Largest relative KKT residual of a solution that is called converged.
KKT_TOL = 1e-8
# Signs are told apart relative to rounding in `Qz + q`, whose terms grow with `z`.
SIGN_TOL = 1e-12
# A pivot of the Cholesky factor (of a unit diagonal) below this marks a dependent row.
RANK_TOL = 1e-12
# An unknown this large (of a unit diagonal, `max|q| = 1`) is the rounding of an infinite one.
LARGEST = 1e8
# Numbers in the largest batch of cut-out systems.
BLOCK = 2_000_000


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


def cut_out(matrices: Array, which: Array, free: Array, right: Array) -> tuple[Array, Array]:
    """Solve on the support, in systems of its size, by Cholesky.

    Returns:
        `x`, zero off the support, and whether the rows of the support are independent.
    """
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
