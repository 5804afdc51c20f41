"""Small linear programs in standard form, solved exactly at a vertex."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func.linalg._dense import factorized, solve_arrays
from torchjd_func.linalg._nnqp import Solution
from torchjd_func.linalg._systems import KKT_TOL

# Signs, and objectives, are told apart relative to rounding in the solve with a basis.
SIGN_TOL = 1e-11
# Pivots for each unknown before Bland's rule, which cannot cycle but takes small pivots, and before
# the simplex method gives up.
QUICK, PIVOTS = 5, 50
TINY = np.finfo(np.float64).tiny  # what is divided by instead of zero


def linear_program(
    objective: Tensor, matrix: Tensor, right: Tensor, *, n_free: int = 0
) -> Solution:
    r"""Maximise a linear function over a polytope.

    $$\arg\max_x c^\top x \quad \text{s.t.}\quad A x = b,\ x_j \ge 0,$$

    where the last `n_free` unknowns may have any sign. `A` has independent rows, scaled by the
    caller so that their largest entries are about 1; the problem is bounded. The optimal basis is
    locally constant, so that the value, one linear solve with it, is differentiable.

    Solved by the simplex method on the CPU, all problems of a batch at once.

    Args:
        objective: `c`, `(..., n)`.
        matrix: `A`, `(..., k, n)`.
        right: `b`, `(..., k)`. Leading dimensions broadcast.
        n_free: Number of unknowns without a sign.

    Returns:
        A `Solution` whose value is `x`, `(..., n)`. `converged` is false, and the value zero, if no
        `x` is feasible. `iterations` counts pivots.

    Raises:
        TypeError: If an argument is not floating-point.
        ValueError: If shapes do not fit, or there are more equations than unknowns.

    References:
        R. G. Bland, New finite pivoting rules for the simplex method, Math. Oper. Res. 2, 1977,
        https://doi.org/10.1287/moor.2.2.103

    Example:
        >>> import torch, torchjd_func as jd
        >>> ones = torch.ones(1, 3)
        >>> jd.linalg.linear_program(torch.tensor([1.0, 3.0, 2.0]), ones, torch.ones(1)).value
        tensor([0., 1., 0.])
    """
    for name, value in (("objective", objective), ("matrix", matrix), ("right", right)):
        _check.floating(f"`{name}`", value)
    _check.linear_program(objective, matrix, right, n_free)
    dtype = torch.promote_types(objective.dtype, matrix.dtype)
    shape = torch.broadcast_shapes(objective.shape[:-1], matrix.shape[:-2], right.shape[:-1])
    k, n = matrix.shape[-2:]
    c = objective.to(torch.float64).expand(*shape, n)
    a = matrix.to(torch.float64).expand(*shape, k, n)
    b = right.to(torch.float64).expand(*shape, k)
    fixed = c.detach(), a.detach(), b.detach(), n_free
    value, basis, feasible, pivots = _host.opaque(lp_vertex, _optimal, *fixed)
    if not _host.unwatched(a, b):
        value = _vertex(a, b, basis, feasible, n_free)
    return Solution(value.to(dtype), feasible, pivots, feasible & False)


def _vertex(a: Tensor, b: Tensor, basis: Tensor, feasible: Tensor, n_free: int) -> Tensor:
    """Solve with a basis, differentiably; zero where it is not feasible."""
    k, n = a.shape[-2:]
    identity = torch.eye(k, dtype=a.dtype, device=a.device).expand(*a.shape[:-1], k)
    columns = torch.cat([a, identity], dim=-1)
    chosen = columns.gather(-1, basis.unsqueeze(-2).expand(identity.shape))
    safe = torch.where(feasible[..., None, None], chosen, identity)
    parts = factorized(safe, torch.where(feasible.unsqueeze(-1), b, 0.0))
    signed = torch.where(basis < n - n_free, parts.clamp(min=0), parts)
    # Not by one_hot, which cannot be mapped (torch 2.13).
    places = basis.unsqueeze(-1) == torch.arange(n, device=basis.device)
    return (signed.unsqueeze(-2) @ places.to(a.dtype)).squeeze(-2)


def _optimal(c: Tensor, a: Tensor, b: Tensor, n_free: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find an optimal vertex for each problem of a batch.

    Args:
        c: `(..., n)` float64.
        a: `(..., k, n)` float64.
        b: `(..., k)` float64.
        n_free: Number of unknowns without a sign, the last ones.

    Returns:
        The vertex `(..., n)`, zero if there is none; its basis `(..., k)` int64, in which `n + i`
        stands for no unknown in equation i; whether there is one, `(...,)` bool; pivots, int64.
    """
    return _host.in_numpy(_simplex, c, a, b, n_free)


def _fake(c: Tensor, a: Tensor, b: Tensor, n_free: int) -> tuple[Tensor, ...]:
    """Tell the compiler the shapes."""
    flag = b.new_empty(b.shape[:-1], dtype=torch.bool)
    return c.new_empty(c.shape), b.new_empty(b.shape, dtype=torch.int64), flag, flag.long()


lp_vertex = _host.operation("lp_vertex", _optimal, _fake, waits=True)


@np.errstate(all="ignore")  # what is not finite is seen in the result
def _simplex(c: Array, a: Array, b: Array, n_free: int) -> tuple[Array, Array, Array, Array]:
    """Start from artificial unknowns, one for each equation, and read what `_walk` ends at.

    A free unknown is the difference of two of one sign.

    Returns:
        As `_optimal`.
    """
    leading, (k, n) = b.shape[:-1], a.shape[-2:]
    c, a, b = c.reshape(-1, n), a.reshape(-1, k, n), b.reshape(-1, k)
    sign, n_real, size = np.where(b > 0, 1.0, -1.0), n + n_free, n + n_free + k
    columns = np.zeros((len(b), size, k))  # as rows, those of the artificial unknowns last
    columns[:, :n_real], columns[:, n_real:] = _split(a * sign[:, :, None], n_free), np.eye(k)
    goals = np.zeros((len(b), size, 2))
    goals[:, n_real:, 0], goals[:, :n_real, 1] = -1.0, _split(c[:, None], n_free)[:, :, 0]
    goals /= np.maximum(np.abs(goals).max(axis=1, keepdims=True), TINY)
    # An unknown that is in one equation alone may start in the place of its artificial one.
    lone = (columns == 1) & (np.count_nonzero(columns, axis=2) == 1)[:, :, None]
    basis, right = lone.argmax(axis=1), np.abs(b)
    level, pivots = _walk(columns, goals, right, basis, n_real)
    feasible = np.isfinite(columns.sum(axis=2) + goals.sum(axis=2)).all(axis=1)
    feasible &= _is_vertex(level, basis < n_real, right)
    x = np.zeros((len(b), size))
    x[np.arange(len(b))[:, None], basis] = np.where(feasible[:, None], level.clip(min=0), 0.0)
    x[:, n - n_free : n] -= x[:, n:n_real]
    value, basis = x[:, :n], np.where(basis < n, basis, basis - n_free)
    flags = feasible.reshape(leading), pivots.reshape(leading)
    return value.reshape(*leading, n), basis.reshape(*leading, k), *flags


def _is_vertex(level: Array, real: Array, right: Array) -> Array:
    """Say whether unknowns in a basis are not negative, or zero if artificial."""
    left = np.abs(np.where(real, 0.0, level)).max(axis=1)
    lowest, size = np.where(real, level, 0.0).min(axis=1), np.abs(level).max(axis=1)
    return (left <= KKT_TOL * (1 + right.max(axis=1))) & (lowest >= -SIGN_TOL * size)


def _split(x: Array, n_free: int) -> Array:
    """Return columns as rows, and the opposites of those of the free unknowns."""
    columns = x.swapaxes(1, 2)
    return np.concatenate([columns, -columns[:, columns.shape[1] - n_free :]], axis=1)


def _walk(
    columns: Array, goals: Array, right: Array, basis: Array, n_real: int
) -> tuple[Array, Array]:
    """Pivot until no unknown would raise the objective.

    First the sum of artificial unknowns falls to zero; then they stay there.

    Args:
        columns: `(N, size, k)`, of each unknown.
        goals: `(N, size, 2)`, what each adds to the objective, in both phases.
        right: `(N, k)`.
        basis: `(N, k)`, which changes in place.
        n_real: How many unknowns are not artificial.

    Returns:
        The unknowns in the basis `(N, k)`, and the numbers of pivots `(N,)`.
    """
    n_problems, size, _ = columns.shape
    each, pivots, level = np.arange(n_problems), np.zeros(n_problems, dtype=np.int64), right
    for count in range(PIVOTS * size):
        chosen = columns[each[:, None], basis]
        prices = solve_arrays(chosen, goals[each[:, None], basis])
        raising = goals - columns @ prices > SIGN_TOL * (1 + np.abs(prices).max(1, keepdims=True))
        raising[each[:, None], basis] = raising[:, n_real:] = False
        first = raising[:, :, 0].any(axis=1, keepdims=True)  # phase
        raising = np.where(first, raising[:, :, 0], raising[:, :, 1])
        entering = raising.argmax(axis=1)
        both = np.stack([right, columns[each, entering]], axis=2)
        level, change = solve_arrays(chosen.swapaxes(1, 2), both).transpose(2, 0, 1)
        # One that is artificial leaves if it would not stay at zero.
        change = np.where((basis >= n_real) & ~first, np.abs(change), change)
        falling = change > SIGN_TOL * np.abs(change).max(axis=1, keepdims=True)
        running = np.flatnonzero(raising.any(axis=1) & falling.any(axis=1))
        if not len(running):
            break
        first_at_zero = _first_at_zero(level, change, falling)
        wanted = change if count < QUICK * size else -basis
        leaving = np.where(first_at_zero, wanted, -np.inf).argmax(axis=1)
        basis[running, leaving[running]] = entering[running]
        pivots[running] += 1
    return level, pivots


def _first_at_zero(level: Array, change: Array, falling: Array) -> Array:
    """Say which unknowns of a basis reach zero first, as one enters."""
    ratio = np.where(falling, level.clip(min=0) / np.where(falling, change, 1.0), np.inf)
    return ratio <= ratio.min(axis=1, keepdims=True) * (1 + SIGN_TOL) + SIGN_TOL
