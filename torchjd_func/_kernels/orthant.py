"""Roots of `G w = (p / w)^(1/alpha)` on a GPU: the method of `linalg._orthant`, in three launches.

Two decide by the min-norm point of the unit rows whether there is a root, the second where block
exchange does not find it; the third finds the root by Newton's method, with systems solved by
sweeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchjd_func._kernels.pivoting import (
    _along_rows,
    _drive,
    _exchange,
    _pivot,
    _unit,
    padded,
    start,
    warps,
)
from torchjd_func.linalg import _orthant, _systems
from torchjd_func.linalg._nnqp import RIDGES
from torchjd_func.linalg._pivoting import PIVOTS

RIDGE = tl.constexpr(RIDGES[torch.float64])
BOUNDARY, HALVINGS = tl.constexpr(_orthant.BOUNDARY), tl.constexpr(_orthant.HALVINGS)
STEP_TOL, KKT_TOL = tl.constexpr(_orthant.STEP_TOL), tl.constexpr(_systems.KKT_TOL)


@triton.jit
def _rows(G, base, m, i, inverse_rows, inverse, active, same, M: tl.constexpr):
    """Load the Gramian of unit rows, with unit vectors in the place of zero rows."""
    U = _unit(G, base, m, i, inverse_rows, inverse, M)
    return tl.where(same & ~active[None, :], 1.0, U)


@triton.jit
def _push(G, base, m, i, inverse_rows, inverse, active, same, x, M: tl.constexpr):
    """Return `U x` for the unit rows."""
    U = _rows(G, base, m, i, inverse_rows, inverse, active, same, M)
    return tl.sum(U * _along_rows(x, same)[:, None], axis=0)


@triton.jit
def _newton(
    G, base, m, i, inverse_rows, inverse, active, same, log_gain, power, x, M: tl.constexpr
):
    """Return Newton's step relative to `x`, what `x U x` should be, and `U x`."""
    on = i < m
    target = tl.where(on, tl.exp(log_gain + (1.0 - power) * tl.log(x)), 1.0)
    pushed = _push(G, base, m, i, inverse_rows, inverse, active, same, x, M)
    root = tl.sqrt(target)
    scale = tl.where(on, x / root, 0.0)
    T = _rows(G, base, m, i, inverse_rows, inverse, active, same, M)
    T = T * _along_rows(scale, same)[:, None] * scale[None, :] + tl.where(same, power, 0.0)
    q = tl.where(on, scale * pushed - target / root, 0.0)
    free = i < 0
    for p in range(m):
        T, q, free, _ = _pivot(T, q, free, i, same, p)
    return tl.where(on, q / root, 0.0), target, pushed


@triton.jit
def _slope(relative, gain, power, constant, linear, step, on):
    """Return the slope of the objective after a step, along it."""
    moved = tl.where(on, 1.0 + step * relative, 1.0)
    barrier = tl.sum(tl.where(on, gain * tl.exp(-power * tl.log(moved)), 0.0), axis=0)
    return constant + linear * step - barrier


@triton.jit(do_not_specialize=["m", "LIMIT"])
def _hull(G, DISTANCE, STATE, m, LIMIT, M: tl.constexpr, DRIVE: tl.constexpr):
    """Measure the squared distance from 0 of the hull of the unit rows; driving, what is left."""
    pid = tl.program_id(0).to(tl.int64)
    if DRIVE and tl.load(STATE + pid) == 1:
        return
    base = pid * m * m
    i = tl.arange(0, M)
    on = i < m
    same = i[:, None] == i[None, :]
    d = tl.load(G + base + i * m + i, mask=on, other=0.0)
    active = d > 0
    inverse = 1.0 / tl.sqrt(tl.where(active, d, 1.0))
    inverse_rows = _along_rows(inverse, same)
    # The min-norm point: with the shift 1, all of the diagonal is 2.
    T = _rows(G, base, m, i, inverse_rows, inverse, active, same, M)
    T = tl.where(on[:, None] & on[None, :], 0.5 * (T + 1.0), T) + tl.where(same, RIDGE, 0.0)
    q = tl.where(on, -1.0, 1.0).to(tl.float64)
    if DRIVE:
        T, q, free, _, _, state = _drive(T, q, i < 0, i, same, LIMIT, M, RIDGE)
    else:
        T, q, free, _, _, state = _exchange(T, q, i < 0, i, same, M, RIDGE)
    z = tl.where(free & (q > 0), q, 0.0)
    z = z / tl.sum(z, axis=0)
    distance = tl.sum(z * _push(G, base, m, i, inverse_rows, inverse, active, same, z, M), axis=0)
    some = tl.max(active.to(tl.int32), axis=0) > 0
    tl.store(DISTANCE + pid, tl.where((state == 1) & some, distance, 0.0))
    tl.store(STATE + pid, state)


@triton.jit(do_not_specialize=["m", "max_iter"])
def _root(G, POWER, SHARES, DISTANCE, W, SOUND, STEPS, m, max_iter, tol, M: tl.constexpr):
    """Solve problem `program_id`."""
    pid = tl.program_id(0).to(tl.int64)
    base = pid * m * m
    i = tl.arange(0, M)
    on = i < m
    same = i[:, None] == i[None, :]
    d = tl.load(G + base + i * m + i, mask=on, other=0.0)
    active = d > 0
    length = tl.sqrt(tl.where(active, d, 1.0))
    inverse = 1.0 / length
    inverse_rows = _along_rows(inverse, same)
    distance = tl.load(DISTANCE + pid)
    exists = distance > tol
    power = tl.load(POWER + pid)
    shares = tl.load(SHARES + pid * m + i, mask=on, other=1.0)
    log_gain = (power - 1.0) * tl.log(length) + power * tl.log(shares)
    # The root for orthogonal rows, scaled to the best point on its ray.
    x = tl.exp(log_gain / (1.0 + power))
    pushed = _push(G, base, m, i, inverse_rows, inverse, active, same, tl.where(on, x, 0.0), M)
    curvature = tl.sum(tl.where(on, x * pushed, 0.0), axis=0)
    total = tl.sum(tl.where(on, tl.exp(log_gain + (1.0 - power) * tl.log(x)), 0.0), axis=0)
    ratio = total / tl.where(curvature > 0, curvature, total)
    x = tl.where(on, x * tl.exp(tl.log(ratio) / (1.0 + power)), 1.0)
    steps = 0
    relative = 0.0 * x
    running = exists
    while running:
        relative, target, pushed = _newton(
            G, base, m, i, inverse_rows, inverse, active, same, log_gain, power, x, M
        )
        largest = tl.max(tl.abs(relative), axis=0)
        running = (largest > STEP_TOL) & (steps < max_iter)
        if running:
            lowest = tl.min(relative, axis=0)
            step = tl.where(lowest < -BOUNDARY, -BOUNDARY / tl.where(lowest < 0, lowest, -1.0), 1.0)
            change = tl.where(on, relative * x, 0.0)
            curved = _push(G, base, m, i, inverse_rows, inverse, active, same, change, M)
            constant, linear = tl.sum(change * pushed, axis=0), tl.sum(change * curved, axis=0)
            gain = tl.where(on, relative * target, 0.0)
            limit = 0.5 * (tl.sum(gain, axis=0) - constant)
            halved = 1
            while (halved < HALVINGS) & (
                _slope(relative, gain, power, constant, linear, step, on) > limit
            ):
                step = 0.5 * step
                halved += 1
            x = x * (1.0 + step * relative)
            steps += 1
    left = tl.max(tl.abs(relative), axis=0)
    small = left <= KKT_TOL
    # Rounding of nearly stationary rows leaves more, however many steps are taken.
    reached = small | (left <= tol / tl.where(exists, distance, 1.0))
    converged = exists & small
    w = tl.where(small, x * (1.0 + relative), x) / length
    w = tl.where(reached, w, float("nan"))
    tl.store(W + pid * m + i, tl.where(exists, tl.where(active, w, 0.0), 0.0), mask=on)
    tl.store(SOUND + pid, converged)
    tl.store(STEPS + pid, steps)


def root_kernel(
    matrices: Tensor, power: Tensor, shares: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find positive roots.

    Args:
        matrices: `(k, m, m)` float64, `m` at most `linalg._device.LARGEST`.
        power: `(k,)` float64, one over `alpha`.
        shares: `(k, m)` float64, positive.
        tol: Squared distance from 0 of the hull of the unit rows up to which there is no root.
        max_iter: Largest number of steps.

    Returns:
        The roots `(k, m)`, 0 where there is none, not-a-number where none is found; whether they
        converged `(k,)`; steps `(k,)`.
    """
    k, m, _ = matrices.shape
    values = matrices.new_empty((k, m))
    sound = torch.empty(k, dtype=torch.bool, device=matrices.device)
    steps = torch.empty(k, dtype=torch.int64, device=matrices.device)
    distances, state = values.new_empty(k), torch.empty(k, dtype=torch.int32, device=values.device)
    size, rows = padded(m), matrices.contiguous()
    if k:
        for drive in (False, True):
            sizes = m, PIVOTS * (m + 1), size, drive
            start(_hull, k, warps(size), rows, distances, state, *sizes)
        given = power.contiguous(), shares.contiguous()
        arrays = rows, *given, distances, values, sound, steps
        start(_root, k, warps(size), *arrays, m, max_iter, tol, size)
    return values, sound, steps
