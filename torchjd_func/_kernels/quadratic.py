"""The non-negative quadratic program on a GPU: two launches, one program for each problem.

The second, by the driving-variable method, has nothing to do for what the first solved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchjd_func._kernels.pivoting import _minimise, padded, start, warps
from torchjd_func.linalg import _pivoting

DEPENDENT_PIVOT = tl.constexpr(_pivoting.DEPENDENT_PIVOT)


@triton.jit(do_not_specialize=["m", "per", "LIMIT"])
def _solve(
    G,
    Q,
    Z,
    FREE,
    SOUND,
    PIVOTS,
    DEPENDENT,
    m,
    per,
    LIMIT,
    tol,
    RIDGE: tl.constexpr,
    M: tl.constexpr,
    DRIVE: tl.constexpr,
):
    """Solve problem `program_id`, of which `per` share a matrix; driving, only what is left."""
    pid = tl.program_id(0).to(tl.int64)
    before = pid - pid
    if DRIVE:
        before = tl.load(PIVOTS + pid)
        if before >= 0:
            return
    i = tl.arange(0, M)
    linear = tl.load(Q + pid * m + i, mask=i < m, other=0.0)
    base, same, none = pid // per * m * m, i[:, None] == i[None, :], 0.0 * linear
    z, free, sound, pivots, least, state = _minimise(
        G, base, linear, m, i, same, 1.0, none, none, LIMIT, tol, RIDGE, M, DRIVE, False
    )
    tl.store(Z + pid * m + i, z, mask=i < m)
    tl.store(FREE + pid * m + i, free, mask=i < m)
    tl.store(SOUND + pid, sound)
    tl.store(DEPENDENT + pid, least < DEPENDENT_PIVOT * RIDGE)
    # Negative, `-1 - pivots`: not solved.
    pivots = tl.where(DRIVE, pivots - 1 - before, pivots)
    tl.store(PIVOTS + pid, tl.where((state == 1) | DRIVE, pivots, -1 - pivots))


class Solved(NamedTuple):
    """What is found for each of `p` problems."""

    value: Tensor  # (p, m); not-a-number where it is not solved
    support: Tensor  # (p, m) bool
    converged: Tensor  # (p,) bool, the conditions of optimality without the ridge hold
    pivots: Tensor  # (p,) int64
    dependent: Tensor  # (p,) bool, a pivot of about the ridge came in


def solve_kernel(matrices: Tensor, vectors: Tensor, ridge: float, tol: float) -> Solved:
    """Minimise `z'Qz / 2 + q'z` over `z >= 0`, for many small problems at once.

    Args:
        matrices: `(k, m, m)` float64, `m` at most `linalg._device.LARGEST`.
        vectors: `(p, m)` float64; each `p / k` in turn share a matrix.
        ridge: What is added to the unit diagonal, of the size of the rounding of the matrices.
        tol: The largest relative residual of the conditions of optimality.

    Returns:
        What is found for each problem.
    """
    p, device = len(vectors), vectors.device
    results = Solved(
        torch.empty_like(vectors, memory_format=torch.contiguous_format),
        torch.empty(vectors.shape, dtype=torch.bool, device=device),
        torch.empty(p, dtype=torch.bool, device=device),
        torch.empty(p, dtype=torch.int64, device=device),
        torch.empty(p, dtype=torch.bool, device=device),
    )
    for drive in (False, True) if p else ():
        launch(matrices, vectors, ridge, tol, results, drive=drive)
    return results


def launch(
    matrices: Tensor,
    vectors: Tensor,
    ridge: float,
    tol: float,
    results: Solved,
    *,
    drive: bool,
) -> None:
    """Write the results; when driving, of problems whose pivots are negative only."""
    p, m = vectors.shape
    per, size = p // len(matrices), padded(m)
    problems = matrices.contiguous(), vectors.contiguous()
    sizes = m, per, _pivoting.PIVOTS * (m + 1), tol, ridge, size, drive
    start(_solve, p, warps(size), *problems, *results, *sizes)
