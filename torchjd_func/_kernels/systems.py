"""Inverses of small regular matrices on a GPU: one launch, without the handles of a library.

A library's cannot be made while a CUDA graph is captured (cuSOLVER, torch 2.11).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torchjd_func._kernels.pivoting import _along_rows, _at, padded, start, warps


@triton.jit(do_not_specialize=["m"])
def _column(A, X, m, M: tl.constexpr):
    """Find column `program_id` of the inverses, by Gauss and Jordan, with the largest pivots."""
    pid = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, M)
    on = i < m
    same = i[:, None] == i[None, :]
    inside = on[:, None] & on[None, :]
    T = tl.load(
        A + pid // m * m * m + i[None, :] * m + i[:, None], mask=inside, other=0.0
    )  # columns
    b = tl.where(i == pid % m, 1.0, 0.0).to(tl.float64)
    left = on
    x = 0.0 * b
    for k in range(m):
        column = tl.sum(tl.where(i[:, None] == k, T, 0.0), axis=0)
        size = tl.where(left, tl.abs(column), -1.0)
        p = tl.min(tl.where(size == tl.max(size, axis=0), i, M), axis=0)
        isp = i == p
        row = tl.sum(tl.where(isp[None, :], T, 0.0), axis=1)  # along the rows of T
        pivot = _at(column, isp)
        value = _at(b, isp) / pivot
        others = tl.where(isp, 0.0, column)
        T = T - row[:, None] * (others / pivot)[None, :]
        b = tl.where(isp, b, b - others * value)
        left = left & (i != p)
        x = tl.where(i == k, p.to(tl.float64), x)  # the row of unknown k
    order = _along_rows(x, same).to(tl.int32)
    chosen = order[:, None] == i[None, :]  # unknown, row
    diagonal = tl.where(on, tl.sum(tl.where(chosen, T, 0.0), axis=1), 1.0)
    right = tl.sum(tl.where(chosen, b[None, :], 0.0), axis=1)
    tl.store(
        X + pid * m + i, tl.sum(tl.where(same, (right / diagonal)[:, None], 0.0), axis=0), mask=on
    )


def inverse_kernel(matrices: Tensor) -> Tensor:
    """Invert matrices `(k, m, m)`, float64; not-a-number where they are singular."""
    k, m, _ = matrices.shape
    columns, size = matrices.new_empty((k, m, m)), padded(m)
    if columns.numel():
        start(_column, k * m, warps(size), matrices.contiguous(), columns, m, size)
    return columns.mT
