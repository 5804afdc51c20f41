"""How far a method is from a property, on one matrix or on all witnesses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tests.matrices import A, B, C, E, K, S, all_matrices, conflict, matrix
from tests.registry import Method, losses_for, run
from torchjd_func.testing._matrices import span_gap

NAMED = [A, B, C, E, S, K]
WITNESSES = NAMED + [found for _, found in all_matrices()]


def witnesses(method: Method) -> list[Tensor]:
    """Return the witnesses with enough rows."""
    return [jac for jac in WITNESSES if len(jac) >= method.min_m]


def cases(method: Method) -> list[tuple[Tensor, Tensor | None]]:
    """Return witnesses with what the method has seen before: nothing, or, for some, a matrix."""
    named = [jac for jac in NAMED if len(jac) >= method.min_m]
    later = [(jac, matrix("gaussian", *jac.shape, seed=99)) for jac in named]
    return [*((jac, None) for jac in witnesses(method)), *later]


def scaled_sum_gap(
    method: Method, jac: Tensor, c: Tensor, d: Tensor, before: Tensor | None = None
) -> float:
    """Return how far `c -> d(diag(c) J)` is from additive, relative to its values."""
    m = len(jac)
    parts = [run(method, scale[:, None] * jac, m, before=before) for scale in (c, d, c + d)]
    size = max(float(part.norm()) for part in parts)
    return float((parts[0] + parts[1] - parts[2]).norm()) / max(size, 1e-300)


@functools.cache
def lowest_conflict(method: Method) -> float:
    """Return the lowest cosine between an update and a row, over all cases."""
    return min(
        float(conflict(jac, run(method, jac, len(jac), before=before)))
        for jac, before in cases(method)
    )


@functools.cache
def scaling_gap(method: Method) -> float:
    """Return the largest distance from additivity in the scale, over all cases."""
    gaps = []
    for jac, before in cases(method):
        ramp = torch.linspace(1.0, 3.0, len(jac), dtype=torch.float64)
        size = float(run(method, jac, len(jac), before=before).norm())
        if size > 1e-7 * float(jac.norm()):  # otherwise only rounding is left
            gaps.append(scaled_sum_gap(method, jac, ramp, ramp.flip(0).square(), before))
    return max(gaps)


@functools.cache
def flip_gap(method: Method) -> float:
    """Return the largest relative change of the update when rows are reversed."""
    gaps = []
    for jac in witnesses(method):
        losses = losses_for(method, len(jac))
        flipped = None if losses is None else losses.flip(0)
        change = run(method, jac.flip(0), len(jac), losses=flipped) - run(method, jac, len(jac))
        gaps.append(float(change.norm() / jac.norm()))
    return max(gaps)


@functools.cache
def span_distance(method: Method) -> float:
    """Return the largest relative distance of the update from the span of the rows."""
    found = [(jac, run(method, jac, len(jac))) for jac in witnesses(method)]
    return max(span_gap(j, d) for j, d in found if float(d.norm()) > 1e-8 * float(j.norm()))
