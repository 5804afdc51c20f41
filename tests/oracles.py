"""Slow, independent references in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def enumerate_nnqp(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solve `min z'Qz/2 + q'z, z >= 0` by trying every support, and keeping the best KKT point."""
    m = len(vector)
    scale = torch.where(matrix.diagonal() > 0, matrix.diagonal(), 1.0).rsqrt()
    unit, linear = matrix * scale * scale[:, None], vector * scale
    best, fault = torch.zeros(m, dtype=torch.float64), torch.tensor(torch.inf)
    for bits in itertools.product([False, True], repeat=m):
        free = torch.tensor(bits)
        z = torch.zeros(m, dtype=torch.float64)
        if free.any():
            z[free] = -torch.linalg.pinv(unit[free][:, free], rtol=1e-12) @ linear[free]
        residual = torch.minimum(z, unit @ z + linear).abs().max()
        if residual < fault * (1 - 1e-9):
            best, fault = z, residual
    return best * scale


def upgrad(jac: Tensor, preference: Tensor | None = None) -> Tensor:
    """Project each row on the dual cone by enumeration, then average."""
    gramian, m = jac @ jac.T, len(jac)
    weights = torch.full((m,), 1 / m, dtype=torch.float64) if preference is None else preference
    direction = torch.zeros(jac.shape[1], dtype=torch.float64)
    for i in range(m):
        multipliers = enumerate_nnqp(gramian, gramian[i])
        direction += weights[i] * (jac[i] + jac.T @ multipliers)
    return direction


def dualproj(jac: Tensor, preference: Tensor | None = None) -> Tensor:
    """Project the combination of the rows on the dual cone by enumeration."""
    gramian, m = jac @ jac.T, len(jac)
    weights = torch.full((m,), 1 / m, dtype=torch.float64) if preference is None else preference
    return jac.T @ (weights + enumerate_nnqp(gramian, gramian @ weights))


def min_norm(jac: Tensor) -> Tensor:
    """Find the shortest convex combination of rows by trying every support."""
    gramian, m = jac @ jac.T, len(jac)
    best, shortest = jac[0], torch.tensor(torch.inf, dtype=torch.float64)
    for bits in itertools.product([False, True], repeat=m):
        free = torch.tensor(bits)
        if not free.any():
            continue
        k = int(free.sum())
        system = torch.zeros(k + 1, k + 1, dtype=torch.float64)
        system[:k, :k], system[k, :k], system[:k, k] = gramian[free][:, free], 1.0, 1.0
        right = torch.zeros(k + 1, dtype=torch.float64)
        right[k] = 1.0
        weights = (torch.linalg.pinv(system) @ right)[:k]
        if weights.min() < -1e-9 or abs(weights.sum() - 1) > 1e-9:
            continue
        point = jac[free].T @ weights
        if point.norm() < shortest:
            best, shortest = point, point.norm()
    return best


def project_simplex(y: Tensor) -> Tensor:
    """Project on the simplex by bisection on the threshold."""
    low, high = y.min() - 1, y.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (y - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (y - low).clamp(min=0)


def jacobian_by_loops(fn, params: dict[str, Tensor], *args) -> dict[str, Tensor]:
    """Differentiate each loss by itself with plain autograd."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    losses = fn(leaves, *args)
    rows = [
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        for loss in losses.reshape(-1)
    ]
    return {
        name: torch.stack(
            [torch.zeros_like(leaves[name]) if row[i] is None else row[i] for row in rows]
        )
        for i, name in enumerate(leaves)
    }
