"""How far a method is from a property, on one matrix or on all witnesses."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.matrices import A, B, C, E, K, S, all_matrices, conflict
from tests.registry import Method, losses_for, run

WITNESSES = [A, B, C, E, S, K] + [found for _, found in all_matrices()]


def witnesses(method: Method) -> list[Tensor]:
    """Return the witnesses with enough rows."""
    return [jac for jac in WITNESSES if len(jac) >= method.min_m]


def scaled_sum_gap(method: Method, jac: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
    """Return how far `c -> d(diag(c) J)` is from additive, relative to its values."""
    m = len(jac)
    parts = [run(method, scale[:, None] * jac, m) for scale in (c, d, c + d)]
    size = max(float(part.norm()) for part in parts)
    return float((parts[0] + parts[1] - parts[2]).norm()) / max(size, 1e-300)


def span_gap(jac: torch.Tensor, direction: torch.Tensor) -> float:
    """Return the relative distance of a direction from the span of the rows."""
    norms = jac.norm(dim=-1, keepdim=True)
    rows = jac / torch.where(norms > 0, norms, 1.0)
    coordinates = torch.linalg.pinv(rows.mT, rtol=1e-10) @ direction
    return float((rows.mT @ coordinates - direction).norm() / direction.norm().clamp(min=1e-300))


def lowest_conflict(method: Method) -> float:
    """Return the lowest cosine between an update and a row, over all witnesses."""
    return min(float(conflict(j, run(method, j, len(j)))) for j in witnesses(method))


def scaling_gap(method: Method) -> float:
    """Return the largest distance from additivity in the scale, over all witnesses."""
    gaps = []
    for jac in witnesses(method):
        ramp = torch.linspace(1.0, 3.0, len(jac), dtype=torch.float64)
        if float(run(method, jac, len(jac)).norm()) > 1e-8 * float(jac.norm()):
            gaps.append(scaled_sum_gap(method, jac, ramp, ramp.flip(0).square()))
    return max(gaps)


def flip_gap(method: Method) -> float:
    """Return the largest relative change of the update when rows are reversed."""
    gaps = []
    for jac in witnesses(method):
        losses = losses_for(method, len(jac))
        flipped = None if losses is None else losses.flip(0)
        change = run(method, jac.flip(0), len(jac), losses=flipped) - run(method, jac, len(jac))
        gaps.append(float(change.norm() / jac.norm()))
    return max(gaps)


def span_distance(method: Method) -> float:
    """Return the largest relative distance of the update from the span of the rows."""
    found = [(jac, run(method, jac, len(jac))) for jac in witnesses(method)]
    return max(span_gap(j, d) for j, d in found if float(d.norm()) > 1e-8 * float(j.norm()))
