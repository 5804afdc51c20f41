"""Supports of many problems with one matrix, by products of matrices alone, on a device.

The method of `_products.py` in torch: here no problem leaves, since a product with a large matrix
takes less time than to choose and copy rows. The host looks how far the problems are, and waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func.linalg._products import LOOSE, PRODUCTS, ROUNDS

# Residuals to which systems are solved, one after another: a last factorisation is to find no wrong
# sign, since it takes as long as `m / 6` products.
RESIDUALS = (*LOOSE, 1e-9)
# Products after which the host looks whether any problem is left.
LOOK = 6


def guess(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find supports by block exchange.

    Args:
        matrix: `(m, m)`, of unit diagonal.
        vectors: `(n, m)`, with largest entries of 1.

    Returns:
        Supports, the rounds that took, and whether the systems of the last were solved, `(n,)`.
    """
    levels, last = vectors.new_tensor(RESIDUALS), len(RESIDUALS) - 1
    z, slope, free = torch.zeros_like(vectors), vectors, vectors < 0
    level = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    rounds, running, done = level, level == 0, level > 0
    for _ in range(ROUNDS):
        tol = levels[level].unsqueeze(-1)
        limit = tol.square().masked_fill(~running.unsqueeze(-1), torch.inf)
        z, slope, solved = _conjugate_gradients(matrix, z, slope, free, limit)
        rounds, running = rounds + running, running & solved
        wrong = (torch.where(free, z, slope) < -tol) & running.unsqueeze(-1)
        right = ~wrong.any(-1)
        done = done | (running & right & (level == last))
        running = running & ~done
        if not running.any() or 2 * (running | done).sum() < len(done):
            break
        level, free = (level + right).clamp(max=last), free ^ wrong
        z = torch.where(free, z, 0.0)
        slope = torch.addmm(vectors, z, matrix)
    return free, rounds, done


def _conjugate_gradients(
    matrix: Tensor, z: Tensor, slope: Tensor, free: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve `Qz + q = slope = 0` on the supports, up to squared residuals `(n, 1)`.

    Returns:
        `z`, the slopes, and whether each problem is solved.
    """
    tiny = torch.finfo(z.dtype).tiny
    left = step = torch.where(free, slope, 0.0)
    square = left.square().sum(-1, keepdim=True)
    for count in range(PRODUCTS):
        active = square > limit
        if count % LOOK == 0 and not active.any():
            break
        pushed = step @ matrix
        curvature = (step * pushed).sum(-1, keepdim=True)
        rate = torch.where(active, square / curvature, 0.0)
        z = torch.addcmul(z, rate, step, value=-1)
        slope = torch.addcmul(slope, rate, pushed, value=-1)
        left = torch.where(free, slope, 0.0)
        before, square = square, left.square().sum(-1, keepdim=True)
        step = torch.addcmul(left, square / (before + tiny), step)
    return z, slope, (square <= limit).squeeze(-1)
