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
    gramian = gramian / gramian.diagonal().max().clamp(min=1e-300)  # as large as the ones beside it
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


def surgery(
    jac: Tensor, orders: Tensor, phi: Tensor | None = None, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Correct the rows one by one, on the rows themselves; return the sum and the new targets.

    Without targets PCGrad, with targets GradVac.
    """
    targets = torch.zeros(len(jac), len(jac), dtype=jac.dtype) if phi is None else phi.clone()
    total = torch.zeros(jac.shape[1], dtype=jac.dtype)
    for i, order in enumerate(orders.tolist()):
        x = jac[i].clone()
        for j in order:
            g, target = jac[j], targets[i, j].clone()
            cancelled = x.norm() <= 1e-6 * jac[i].norm()
            scale = torch.where(cancelled, 0.0, x.norm() * g.norm())
            cosine = (x @ g) / scale if scale > 0 else torch.zeros((), dtype=jac.dtype)
            if cosine < target and scale > 0:
                angle = torch.arccos(cosine.clamp(-1, 1)) - torch.arccos(target)
                x = x + x.norm() * torch.sin(angle) / torch.sin(torch.arccos(target)) * g / g.norm()
            if phi is not None:
                targets[i, j] = (1 - beta) * target + beta * cosine
        total += x
    return total, targets


def cagrad(jac: Tensor, c: float, preference: Tensor | None = None) -> Tensor:
    """Try every support of the addition to the mean, and keep the best feasible direction."""
    m = len(jac)
    mean = jac.mean(0) if preference is None else jac.T @ preference
    pushed, radius = jac @ mean, c * mean.norm()
    best, value = mean, pushed.min()
    for bits in itertools.product([False, True], repeat=m):
        free = torch.tensor(bits)
        if not free.any():
            continue
        inverse = torch.linalg.pinv(jac[free] @ jac[free].T)
        p, q = inverse.sum(-1), inverse @ pushed[free]
        a, b, e = p.sum(), q.sum(), q @ pushed[free] - radius**2
        if b**2 - a * e < 0:
            continue
        added = (((b + (b**2 - a * e).sqrt()) / a) * p - q).clamp(min=0)
        direction = mean + jac[free].T @ added
        feasible = (direction - mean).norm() <= radius * (1 + 1e-9)
        if feasible and (jac @ direction).min() > value:
            best, value = direction, (jac @ direction).min()
    return best


def config(jac: Tensor, preference: Tensor) -> Tensor:
    """Take the pseudo-inverse of the unit rows themselves."""
    units = jac / jac.norm(dim=1, keepdim=True)
    direction = torch.linalg.pinv(units) @ preference
    direction = direction / direction.norm()
    return (jac @ direction).sum() * direction


def config_momentum(
    rows: list[tuple[int, Tensor]], m: int, beta_1: float, beta_2: float
) -> list[Tensor]:
    """Visit the given rows one at a time."""
    n = rows[0][1].shape[0]
    momenta, visits = torch.zeros(m, n, dtype=torch.float64), [0] * m
    first = torch.zeros(n, dtype=torch.float64)
    second, k, out = first.clone(), 0, []
    for index, row in rows:
        momenta[index] = beta_1 * momenta[index] + (1 - beta_1) * row
        visits[index] += 1
        if 0 in visits:
            out.append(torch.zeros(n, dtype=torch.float64))
            continue
        k += 1
        unbiased = torch.stack([momenta[i] / (1 - beta_1 ** visits[i]) for i in range(m)])
        d = config(unbiased, torch.ones(m, dtype=torch.float64))
        shrunk = d * (1 - beta_1**k)
        implied = (shrunk - beta_1 * first) / (1 - beta_1)
        first = shrunk
        second = beta_2 * second + (1 - beta_2) * implied**2
        out.append(d / ((second / (1 - beta_2**k)).sqrt() + 1e-8))
    return out
