"""Small linear programs in standard form, solved exactly at a vertex."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func.linalg._dense import factorized
from torchjd_func.linalg._nnqp import Solution
from torchjd_func.linalg._systems import KKT_TOL

# Up to this many bases all are tried; beyond, the simplex method walks.
MAX_ENUMERATED = 256
# Signs, and objectives, are told apart relative to rounding in the solve with a basis.
SIGN_TOL = 1e-11


def linear_program(
    objective: Tensor, matrix: Tensor, right: Tensor, *, n_free: int = 0
) -> Solution:
    r"""Maximise a linear function over a polytope.

    $$\arg\max_x c^\top x \quad \text{s.t.}\quad A x = b,\ x_j \ge 0,$$

    where the last `n_free` unknowns may have any sign. `A` has independent rows, scaled by the
    caller so that their largest entries are about 1; the problem is bounded. The optimal basis is
    locally constant, so that the value, one linear solve with it, is differentiable.

    | number of bases | route | cost |
    |---|---|---|
    | up to 256 | all of them, in one batched solve of plain torch | bases x k^3 |
    | more | simplex method with Bland's rule, one problem at a time on the CPU | about n k^3 |

    Args:
        objective: `c`, `(..., n)`.
        matrix: `A`, `(..., k, n)`.
        right: `b`, `(..., k)`. Leading dimensions broadcast.
        n_free: Number of unknowns without a sign.

    Returns:
        A `Solution` whose value is `x`, `(..., n)`. `converged` is false, and the value zero, if no
        `x` is feasible. `iterations` counts pivots, or the bases that were tried.

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
    fixed = c.detach(), a.detach(), b.detach()
    if math.comb(n - n_free, k - n_free) <= MAX_ENUMERATED:
        basis, iterations = _enumerate(*fixed, n_free)
    else:
        basis, iterations = lp_basis(*fixed, n_free)
    value, converged = _vertex(a, b, basis, n_free)
    return Solution(value.to(dtype), converged, iterations, torch.zeros_like(converged))


def _vertex(a: Tensor, b: Tensor, basis: Tensor, n_free: int) -> tuple[Tensor, Tensor]:
    """Solve with a basis.

    Returns:
        `x` and whether it is feasible; zero if not.
    """
    k, n = a.shape[-2:]
    columns = a.gather(-1, basis.unsqueeze(-2).expand((*a.shape[:-1], k)))
    feasible = _feasible(columns.detach(), b.detach(), basis, n - n_free)
    identity = torch.eye(k, dtype=a.dtype, device=a.device)
    safe = torch.where(feasible[..., None, None], columns, identity)
    parts = factorized(safe, torch.where(feasible[..., None], b, 0.0))
    signed = torch.where(basis < n - n_free, parts.clamp(min=0), parts)
    places = torch.nn.functional.one_hot(basis, n).to(a.dtype)
    return (signed.unsqueeze(-2) @ places).squeeze(-2), feasible


def _feasible(columns: Tensor, b: Tensor, basis: Tensor, n_signed: int) -> Tensor:
    """Say whether the solution of a basis solves the equations, and has the right signs."""
    parts, _ = torch.linalg.solve_ex(columns, b)
    size = parts.abs().amax(-1)
    residual = ((columns @ parts.unsqueeze(-1)).squeeze(-1) - b).abs().amax(-1)
    lowest = torch.where(basis < n_signed, parts, torch.inf).amin(-1)
    # A singular basis gives numbers that are not finite, and fails every comparison.
    return (residual <= KKT_TOL * (1 + b.abs().amax(-1))) & (lowest >= -SIGN_TOL * size)


def _enumerate(c: Tensor, a: Tensor, b: Tensor, n_free: int) -> tuple[Tensor, Tensor]:
    """Try every basis (which holds all free unknowns), and take the first of the best.

    Returns:
        The basis `(..., k)` and the number of bases.
    """
    k, n = a.shape[-2:]
    free = tuple(range(n - n_free, n))
    choices = [signed + free for signed in itertools.combinations(range(n - n_free), k - n_free)]
    bases = torch.tensor(choices, dtype=torch.int64, device=a.device)
    columns = a[..., bases].movedim(-2, -3)  # (..., n_bases, k, k)
    right = b.unsqueeze(-2).expand(columns.shape[:-1])
    parts, _ = torch.linalg.solve_ex(columns, right)
    feasible = _feasible(columns, right, bases, n - n_free)
    terms = c[..., bases] * parts
    gain = torch.where(feasible, terms.sum(-1), -torch.inf)
    rounding = SIGN_TOL * torch.where(feasible, terms.abs().amax(-1), 0.0).amax(-1, keepdim=True)
    best = (gain >= gain.amax(-1, keepdim=True) - rounding).to(torch.int64).argmax(-1)
    chosen = torch.nn.functional.one_hot(best, len(choices)).unsqueeze(-1) * bases
    return chosen.sum(-2), torch.full_like(best, len(choices))


def _bases(c: Tensor, a: Tensor, b: Tensor, n_free: int) -> tuple[Tensor, Tensor]:
    """Find the basis of an optimal vertex for each problem of a batch, by the simplex method.

    Args:
        c: `(..., n)` float64.
        a: `(..., k, n)` float64.
        b: `(..., k)` float64.
        n_free: Number of unknowns without a sign, the last ones.

    Returns:
        `basis` `(..., k)` int64, of no meaning for an infeasible problem, and `iterations` `(...,)`
        int64.
    """
    k, n = a.shape[-2:]
    flat = zip(
        c.reshape(-1, n).cpu().numpy(),
        a.reshape(-1, k, n).cpu().numpy(),
        b.reshape(-1, k).cpu().numpy(),
        strict=True,
    )
    found = [_simplex(*problem, n_free) for problem in flat]
    bases = np.array([basis for basis, _ in found], dtype=np.int64).reshape(b.shape)
    counts = np.array([count for _, count in found], dtype=np.int64).reshape(b.shape[:-1])
    return torch.from_numpy(bases).to(a.device), torch.from_numpy(counts).to(a.device)


def _fake(c: Tensor, a: Tensor, b: Tensor, n_free: int) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes."""
    return (
        b.new_empty(b.shape, dtype=torch.int64),
        b.new_empty(b.shape[:-1], dtype=torch.int64),
    )


lp_basis = _host.operation("lp_basis", _bases, _fake, waits=True)


def _simplex(c: np.ndarray, a: np.ndarray, b: np.ndarray, n_free: int) -> tuple[np.ndarray, int]:
    """Solve one problem in two phases; a free unknown is the difference of two of one sign.

    Returns:
        The basis and the number of pivots.
    """
    k, n = a.shape
    sign = np.where(b < 0, -1.0, 1.0)
    split = np.concatenate([a, -a[:, n - n_free :]], axis=1) * sign[:, None]
    extended = np.concatenate([split, np.eye(k)], axis=1)
    n_real = split.shape[1]
    start = np.arange(n_real, n_real + k)
    if not (np.isfinite(extended).all() and np.isfinite(b).all() and np.isfinite(c).all()):
        return np.arange(k), 0
    shortfall = np.concatenate([np.zeros(n_real), -np.ones(k)])
    basis, first = _walk(shortfall, extended, b * sign, start, n_real)
    basis = _expel(extended, basis, n_real)
    unit = c / max(np.abs(c).max(), np.finfo(np.float64).tiny)
    gain = np.concatenate([unit, -unit[n - n_free :], np.zeros(k)])
    basis, second = _walk(gain, extended, b * sign, basis, n_real)
    return np.where(basis < n, basis, (basis - n_free) % n), first + second


def _walk(
    c: np.ndarray, a: np.ndarray, b: np.ndarray, basis: np.ndarray, n_real: int
) -> tuple[np.ndarray, int]:
    """Pivot by Bland's rule, which cannot cycle, until no unknown would raise the objective.

    Returns:
        The basis and the number of pivots.
    """
    for count in range(50 * a.shape[1]):
        columns = a[:, basis]
        prices = np.linalg.solve(columns.T, c[basis])
        raising = np.flatnonzero((c - prices @ a)[:n_real] > SIGN_TOL * (1 + np.abs(prices).max()))
        raising = raising[~np.isin(raising, basis)]
        if not len(raising):
            return basis, count
        level, change = np.linalg.solve(columns, np.stack([b, a[:, raising[0]]], axis=1)).T
        falling = change > SIGN_TOL * np.abs(change).max()
        if not falling.any():
            return basis, count  # unbounded
        ratio = np.where(falling, level.clip(min=0) / np.where(falling, change, 1.0), np.inf)
        tied = np.flatnonzero(ratio <= ratio.min() * (1 + SIGN_TOL))
        basis = basis.copy()
        basis[tied[basis[tied].argmin()]] = raising[0]
    return basis, 50 * a.shape[1]


def _expel(a: np.ndarray, basis: np.ndarray, n_real: int) -> np.ndarray:
    """Exchange the artificial unknowns that are left in a basis, at level 0, for real ones."""
    basis = basis.copy()
    for place in np.flatnonzero(basis >= n_real):
        row = np.linalg.solve(a[:, basis], a[:, :n_real])[place]
        row[basis[basis < n_real]] = 0
        basis[place] = np.abs(row).argmax()
    return basis
