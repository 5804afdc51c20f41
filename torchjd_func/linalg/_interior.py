"""Quadratic programs too large for a kernel, on a device.

The method of `_pivoting.py` with a ridge throughout, but supports are found by a primal-dual
interior point: as many steps whatever the numbers, each by one Cholesky factor of a problem. What
is left of wrong signs is then exchanged, and the best solution refined towards no ridge. It does
not wait for the device in a graph; outside it may, so problems with one matrix are first tried by
`_conjugate.py`: a factor of each of `m` problems takes as long as `m / 6` of its products.

S. Mehrotra, On the implementation of a primal-dual interior point method, SIAM J. Optim. 2, 1992.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func.linalg._conjugate import guess
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
    """The best of the solutions so far."""

    z: Tensor  # (n, m)
    support: Tensor  # (n, m) bool
    gap: Tensor  # (n,), the residual of the conditions
    dependent: Tensor  # (n,) bool
    steps: Tensor  # (n,) int64


Solve = Callable[[Program, Found, float], Found]


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
    size = n // max(1, len(matrices))
    of_matrix, of_problems = (1, size) if size > 1 else 2 * (_at_once(m),)
    pairs = zip(matrices.split(of_matrix), vectors.split(of_problems), strict=True)
    parts = [_minimise(matrix, own, ridge) for matrix, own in pairs]
    return tuple(torch.cat(parts) for parts in zip(*parts, strict=True))


def _at_once(m: int) -> int:
    """Return how many problems are solved at a time."""
    return max(1, BLOCK // m**2)


def _minimise(matrices: Tensor, vectors: Tensor, ridge: float) -> tuple[Tensor, ...]:
    """Scale, search, and scale back."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    unit = matrices * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    linear = vectors * scale
    size = linear.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    program = Program(unit, unit + ridge * _host.identity(unit), linear / size)
    found = _search(program, ridge)
    sound = _sound(found, ridge)
    value = torch.where(sound.unsqueeze(-1), found.z * scale * size, torch.nan)
    return value, found.support, sound, found.steps, found.dependent


def _search(program: Program, ridge: float) -> Found:
    """Solve by products what these can, and all else, or in a graph, by the interior point."""
    start = _nothing(program)
    if len(program.matrix) > 1 or not _host.may_wait(program.vector):
        return _in_parts(_by_interior, program, start, ridge)
    support, rounds, near = guess(program.matrix[0], program.vector)
    found = start._replace(support=support, steps=rounds)
    if near.any():
        found = _in_parts(_exchanged, program, found, ridge)
    left = (~_sound(found, ridge)).nonzero().squeeze(-1)
    if not len(left):
        return found
    program = program._replace(vector=program.vector[left])
    rest = _in_parts(_by_interior, program, Found(*(x[left] for x in found)), ridge)
    return Found(*(x.index_copy(0, left, part) for x, part in zip(found, rest, strict=True)))


def _nothing(program: Program) -> Found:
    """Return what is known before the search."""
    z = torch.zeros_like(program.vector)
    unknown = z[:, 0] + torch.inf
    return Found(z, z > 0, unknown, unknown > 0, unknown.new_zeros(len(z), dtype=torch.int64))


def _in_parts(solve: Solve, program: Program, found: Found, ridge: float) -> Found:
    """Solve as many problems at a time as there is memory for."""
    m = program.vector.shape[-1]
    parts = [
        solve(program._replace(vector=vector), Found(*fields), ridge)
        for vector, *fields in zip(
            *(x.split(_at_once(m)) for x in (program.vector, *found)), strict=True
        )
    ]
    return Found(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _sound(found: Found, ridge: float) -> Tensor:
    """Say which solutions meet the conditions, and are no longer than with a ridge they may be."""
    return (found.gap <= max(KKT_TOL, 2 * ridge)) & (found.z.amax(-1) < ridge**-0.75)


def _by_interior(program: Program, found: Found, ridge: float) -> Found:
    """Follow the central path to the end; exchange what is left of wrong signs."""
    pair, steps = _interior(program)
    idle = (program.matrix.diagonal(dim1=-2, dim2=-1) == 0) & (program.vector >= 0)
    support = (pair[0] > pair[1]) & ~idle
    z = torch.where(support, pair[0], 0.0)
    # Where rounding spoils all systems on supports, the end of the path is a solution as well.
    gap = _gap(z, times(program.matrix, z) + program.vector)
    start = Found(z, support, gap, torch.ones_like(found.dependent), found.steps + steps)
    return _exchanged(program, start, ridge)


def _gap(z: Tensor, slope: Tensor) -> Tensor:
    """Return the relative residual of the conditions."""
    return torch.minimum(z, slope).abs().amax(-1) / (1 + z.amax(-1))


def _interior(program: Program) -> tuple[Tensor, Tensor]:
    """Follow the central path; return unknowns and slopes, and the steps."""
    pair = program.vector.new_ones((2, *program.vector.shape))
    steps = torch.zeros(len(program.vector), dtype=torch.int64, device=pair.device)
    running, early = steps == 0, _host.may_wait(pair)
    for _ in range(STEPS):
        after, mean = _step(program, pair)
        # What is not a number stays where it was.
        running = running & (mean.squeeze(-1) > CENTRED) & (after.amin((0, -1)) > 0)
        pair, steps = torch.where(running.unsqueeze(-1), after, pair), steps + running
        if early and not running.any():
            break
    return pair, steps


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


def _exchanged(program: Program, found: Found, ridge: float) -> Found:
    """Solve on the support, exchange wrong signs, and so on; keep the best."""
    support, early = found.support, _host.may_wait(found.z)
    for _ in range(EXCHANGES):
        attempt, wrong = _on(program, support, found.steps, DEPENDENT_PIVOT * ridge)
        better = attempt.gap <= found.gap  # not where the attempt is not a number
        kept = (torch.where(_like(better, a), a, b) for a, b in zip(attempt, found, strict=True))
        found, support = Found(*kept), support ^ wrong
        if early and not wrong.any():
            break
    return found


def _like(flags: Tensor, x: Tensor) -> Tensor:
    """Return flags of problems in the dimensions of what belongs to them."""
    return flags.unsqueeze(-1) if x.ndim > 1 else flags


def _on(program: Program, support: Tensor, steps: Tensor, least: float) -> tuple[Found, Tensor]:
    """Solve on a support and refine; also return what has the wrong sign."""
    matrix, definite, vector = program
    factor = factor_on(definite, support)
    signed = solve_on(factor, support, -vector)
    slope = torch.where(support, signed, times(definite, signed) + vector)
    wrong = slope < -SIGN_TOL * (1 + signed.abs().amax(-1, keepdim=True))
    z = signed.clamp(min=0)
    slope = times(matrix, z) + vector
    gap = _gap(z, slope)
    for _ in range(REFINEMENTS):
        moved = z + solve_on(factor, support, -slope)
        same = moved.amin(-1) >= -CHANGED * (1 + moved.amax(-1))
        moved = moved.clamp(min=0)
        pushed = times(matrix, moved) + vector
        left = _gap(moved, pushed)
        better = same & (left < 0.5 * gap)
        z, slope = (
            torch.where(better.unsqueeze(-1), new, old)
            for new, old in ((moved, z), (pushed, slope))
        )
        gap = torch.where(better, left, gap)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return Found(z, support, gap, pivots < least, steps), wrong
