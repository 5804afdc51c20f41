"""Eigenvalues of small symmetric matrices on a GPU: one launch.

`torch.linalg.eigh` waits for the device and cannot be captured in a CUDA graph (torch 2.13).
Here, Jacobi's method (G. H. Golub, C. F. Van Loan, Matrix Computations, section 8.5) rotates all
disjoint pairs of a round at once: with a size that is a power of two, round `r` pairs `j` with
`j xor r`, and `size - 1` rounds meet every pair once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torchjd_func._kernels.pivoting import padded, start, warps

SWEEPS = 16  # 6 to 9 do; entries of a converged matrix are not rotated again


@triton.jit
def _rotation(A, i, same, partner, threshold):
    """Return cosine and signed sine, for each column, of the rotations that clear a round."""
    meets = i[:, None] == partner[None, :]
    # Of both triangles, which rounding sets apart: else two of a pair would turn by two angles.
    mirrored = tl.sum(tl.where(meets, A, 0.0), axis=1)
    off = 0.5 * tl.sum(tl.where(meets, A, 0.0) + tl.where(same, mirrored[:, None], 0.0), axis=0)
    own = tl.sum(tl.where(same, A, 0.0), axis=0)
    rows = tl.sum(tl.where(same, A, 0.0), axis=1)
    other = tl.sum(tl.where(meets, rows[:, None], 0.0), axis=0)
    low = i < partner
    gap = tl.where(low, other - own, own - other)
    act = tl.abs(off) > threshold
    theta = gap / (2.0 * tl.where(act, off, 1.0))
    t = tl.where(theta >= 0, 1.0, -1.0) / (tl.abs(theta) + tl.sqrt(theta * theta + 1.0))
    t = tl.where(act, t, 0.0)
    cosine = 1.0 / tl.sqrt(1.0 + t * t)
    return cosine, tl.where(low, -t, t) * cosine


@triton.jit
def _rotate(A, cosine, sine, partner, M: tl.constexpr):
    """Rotate pairs of columns."""
    moved = tl.gather(A, tl.broadcast_to(partner[None, :], (M, M)), 1)
    return A * cosine[None, :] + moved * sine[None, :]


@triton.jit(do_not_specialize=["m"])
def _eigh(A_POINTER, VALUES, VECTORS, m, SWEEPS: tl.constexpr, M: tl.constexpr):
    """Diagonalise matrix `program_id`."""
    pid = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, M)
    inside = (i < m)[:, None] & (i < m)[None, :]
    place = pid * m * m + i[:, None] * m + i[None, :]
    A = tl.load(A_POINTER + place, mask=inside, other=0.0)
    same = i[:, None] == i[None, :]
    V = tl.where(same, 1.0, 0.0).to(tl.float64)
    size = tl.max(tl.max(tl.abs(A), axis=1), axis=0)
    threshold = 5e-17 * size
    left = size
    sweep = 0
    while (sweep < SWEEPS) & (left > 8.0 * threshold):
        for r in range(1, M):
            partner = i ^ r
            cosine, sine = _rotation(A, i, same, partner, threshold)
            V = _rotate(V, cosine, sine, partner, M)
            A = tl.trans(_rotate(A, cosine, sine, partner, M))
            A = _rotate(A, cosine, sine, partner, M)
        left = tl.max(tl.max(tl.where(same, 0.0, tl.abs(A)), axis=1), axis=0)
        sweep += 1
    nothing = 0.0 * tl.sum(tl.sum(A, axis=1), axis=0)  # or not-a-number, which `max` passes over
    values = tl.sum(tl.where(same, A, 0.0), axis=0)
    others = tl.sum(tl.where(same, values[None, :], 0.0), axis=1)
    before = (others[:, None] < values[None, :]) | (
        (others[:, None] == values[None, :]) & (i[:, None] < i[None, :])
    )
    rank = tl.sum((before & (i < m)[:, None]).to(tl.int32), axis=0)
    rank = tl.where(tl.abs(nothing) <= 0.0, rank, i)
    tl.store(VALUES + pid * m + rank, values + nothing, mask=i < m)
    place = pid * m * m + i[:, None] * m + rank[None, :]
    tl.store(VECTORS + place, V + nothing, mask=inside)


def eigh_kernel(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalise symmetric matrices.

    Args:
        matrices: `(k, m, m)` float64, `m` at most `linalg._eigh.LARGEST`.

    Returns:
        Eigenvalues `(k, m)`, ascending, and eigenvectors `(k, m, m)` in columns; not-a-number for a
        matrix that is not finite.
    """
    k, m, _ = matrices.shape
    values, vectors = matrices.new_empty((k, m)), matrices.new_empty((k, m, m))
    size = padded(m)
    if k:
        arrays = matrices.contiguous(), values, vectors
        start(_eigh, k, warps(size), *arrays, m, SWEEPS, size)
    return values, vectors
