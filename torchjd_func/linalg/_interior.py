"""Quadratic programs too large for a kernel, on a device that is not waited for.

The method of `_pivoting.py` with a ridge throughout, but supports are found by a primal-dual
interior point: as many steps whatever the numbers, each by one Cholesky factor of a problem. What
is left of wrong signs is then exchanged, and the best solution refined towards no ridge.

S. Mehrotra, On the implementation of a primal-dual interior point method, SIAM J. Optim. 2, 1992.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func.linalg._dense import factor_on, solve_factored, solve_on, times
from torchjd_func.linalg._pivoting import CHANGED, DEPENDENT_PIVOT, REFINEMENTS, SIGN_TOL
from torchjd_func.linalg._systems import KKT_TOL

# Steps of the interior point (12 to 25 do), and the mean product of unknowns and slopes that ends.
STEPS, CENTRED = 40, 1e-24
# Part of the way to the boundary that a step may go.
BOUNDARY = 0.995
# Supports that are tried.
EXCHANGES = 4
# Numbers in the matrices of the problems that are solved at a time: 1 GB.
BLOCK = 2**27


class Program(NamedTuple):
    """Problems `(n, m)` on a matrix of unit diagonal, their own or one for all."""

    matrix: Tensor  # (n, m, m), or (1, m, m)
    definite: Tensor  # the same with a ridge
    vector: Tensor  # (n, m), the largest entry of each is 1


class Found(NamedTuple):
    """The best of the supports so far."""

    z: Tensor  # (n, m)
    support: Tensor  # (n, m) bool
    gap: Tensor  # (n,), the residual of the conditions
    dependent: Tensor  # (n,) bool


def minimise(matrices: Tensor, vectors: Tensor, ridge: float) -> tuple[Tensor, ...]:
    """Solve `(n, m)` problems of which each `n / k` in turn share a matrix.

    Args:
        matrices: `(k, m, m)` float64.
        vectors: `(n, m)` float64.
        ridge: The rounding of the entries of `matrices`, relative to the diagonal.

    Returns:
        Value, support, whether it converged, steps, and whether rows are dependent.
    """
    n, m = vectors.shape
    per, at_once = n // max(1, len(matrices)), max(1, BLOCK // m**2)
    if per <= 1:
        pairs = zip(matrices.split(at_once), vectors.split(at_once), strict=True)
    else:
        pairs = (
            (matrix, part)
            for matrix, own in zip(matrices.split(1), vectors.split(per), strict=True)
            for part in own.split(at_once)
        )
    parts = [_minimise(matrix, part, ridge) for matrix, part in pairs]
    return tuple(torch.cat(parts) for parts in zip(*parts, strict=True))


def _minimise(matrices: Tensor, vectors: Tensor, ridge: float) -> tuple[Tensor, ...]:
    """Scale, find the supports, refine, and scale back."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    unit = matrices * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    linear = vectors * scale
    size = linear.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    program = Program(unit, unit + ridge * _host.identity(unit), linear / size)
    support, steps = _interior(program)
    found = _exchanged(program, support, DEPENDENT_PIVOT * ridge)
    longest = found.z.amax(-1)
    sound = (found.gap <= max(KKT_TOL, 2 * ridge)) & (longest < ridge**-0.75)
    value = torch.where(sound.unsqueeze(-1), found.z * scale * size, torch.nan)
    return value, found.support, sound, steps, found.dependent


def _interior(program: Program) -> tuple[Tensor, Tensor]:
    """Follow the central path; return which unknowns exceed their slopes, and the steps."""
    pair = program.vector.new_ones((2, *program.vector.shape))  # unknowns and slopes
    steps = torch.zeros(len(program.vector), dtype=torch.int64, device=pair.device)
    running, early = steps == 0, _host.may_wait(pair)
    for _ in range(STEPS):
        after, mean = _step(program, pair)
        # What is not a number stays where it was.
        running = running & (mean.squeeze(-1) > CENTRED) & (after.amin((0, -1)) > 0)
        pair, steps = torch.where(running.unsqueeze(-1), after, pair), steps + running
        if early and not running.any():
            break
    idle = (program.matrix.diagonal(dim1=-2, dim2=-1) == 0) & (program.vector >= 0)
    return (pair[0] > pair[1]) & ~idle, steps


def _step(program: Program, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Predict, correct, and step; also return the mean product of before."""
    z, y = pair.unbind()
    ratio = y / z
    factor, _ = torch.linalg.cholesky_ex(program.definite + torch.diag_embed(ratio))
    slope = times(program.definite, z) + program.vector
    dz = solve_factored(factor, -slope)
    dy = torch.addcmul(-y, ratio, dz, value=-1)
    predicted = _moved(pair, torch.stack([dz, dy]))
    mean = (z * y).mean(-1, keepdim=True)
    centre = predicted.prod(0).mean(-1, keepdim=True) ** 3 / mean.square()
    aim = torch.addcmul(centre, dz, dy, value=-1) / z
    dz = solve_factored(factor, aim - slope)
    dy = torch.addcmul(aim - y, ratio, dz, value=-1)
    return _moved(pair, torch.stack([dz, dy])), mean


def _moved(pair: Tensor, change: Tensor) -> Tensor:
    """Step as far as all stays positive."""
    lowest = (change / pair).amin((0, -1)).unsqueeze(-1)
    return torch.addcmul(pair, -BOUNDARY / lowest.clamp(max=-BOUNDARY), change)


def _exchanged(program: Program, support: Tensor, least: float) -> Found:
    """Solve on the support, exchange wrong signs, and so on; keep the best."""
    found, wrong = _on(program, support, least)
    for _ in range(EXCHANGES - 1):
        support = support ^ wrong
        attempt, wrong = _on(program, support, least)
        better = ~(found.gap <= attempt.gap)  # also where nothing was a number
        kept = (torch.where(_like(better, a), a, b) for a, b in zip(attempt, found, strict=True))
        found = Found(*kept)
    return found


def _like(flags: Tensor, x: Tensor) -> Tensor:
    """Return flags of problems in the dimensions of what belongs to them."""
    return flags.unsqueeze(-1) if x.ndim > 1 else flags


def _on(program: Program, support: Tensor, least: float) -> tuple[Found, Tensor]:
    """Solve on a support and refine; also return what has the wrong sign."""
    matrix, definite, vector = program
    factor = factor_on(definite, support)
    signed = solve_on(factor, support, -vector)
    slope = torch.where(support, signed, times(definite, signed) + vector)
    wrong = slope < -SIGN_TOL * (1 + signed.abs().amax(-1, keepdim=True))
    z = signed.clamp(min=0)
    slope = times(matrix, z) + vector
    gap = torch.minimum(z, slope).abs().amax(-1)
    for _ in range(REFINEMENTS):
        moved = z + solve_on(factor, support, -slope)
        same = moved.amin(-1) >= -CHANGED * (1 + moved.amax(-1))
        moved = moved.clamp(min=0)
        pushed = times(matrix, moved) + vector
        left = torch.minimum(moved, pushed).abs().amax(-1)
        better = same & (left < 0.5 * gap)
        z, slope = (
            torch.where(better.unsqueeze(-1), new, old)
            for new, old in ((moved, z), (pushed, slope))
        )
        gap = torch.where(better, left, gap)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return Found(z, support, gap / (1 + z.amax(-1)), pivots < least), wrong
