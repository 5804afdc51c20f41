"""Which unknowns of a non-negative quadratic program are positive: a combinatorial search.

The search branches on values, so it is an opaque operator to the compiler and to `torch.func`; it
is not differentiated (see `_nnqp.py`). Problems arrive preconditioned: unit diagonal, `max|q| = 1`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import qpsolvers
import torch
from torch import Tensor

# Signs are told apart relative to rounding in `Q z + q`, whose terms grow with `z`.
SIGN_TOL = 1e-12
# A pivot of the Cholesky factor (of a unit diagonal) below this marks a dependent row.
RANK_TOL = 1e-12
# Full flips without improvement before the fast path gives up.
PATIENCE = 3


@torch.library.custom_op("torchjd_func::nnqp_support", mutates_args=())
def nnqp_support(matrix: Tensor, vector: Tensor, solver: str) -> tuple[Tensor, Tensor, Tensor]:
    """Find the support of `argmin_{z >= 0} z'Qz/2 + q'z` for each problem of a batch.

    Args:
        matrix: `(..., m, m)` float64, positive semi-definite, unit diagonal.
        vector: `(..., m)` float64.
        solver: `"auto"`, or the name of a solver of qpsolvers.

    Returns:
        `support` `(..., m)` bool, `iterations` `(...,)` int64, `fallback` `(...,)` bool: whether
        the exact path had to take over.
    """
    shape, m = vector.shape[:-1], vector.shape[-1]
    flat_matrix, flat_vector = matrix.reshape(-1, m, m), vector.reshape(-1, m)
    if solver == "auto":
        support, iterations, done = _block_pivoting(flat_matrix, flat_vector)
        rest = (~done).nonzero().flatten()
        if len(rest):
            support[rest], extra = _active_set(flat_matrix[rest], flat_vector[rest])
            iterations[rest] += extra
    else:
        support = _reference(flat_matrix, flat_vector, solver)
        done = support.new_ones(len(support))
        iterations = done.to(torch.int64)
    return support.reshape(vector.shape), iterations.reshape(shape), ~done.reshape(shape)


@nnqp_support.register_fake
def _fake(matrix: Tensor, vector: Tensor, solver: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tell the compiler the shapes."""
    shape = vector.shape[:-1]
    return (
        vector.new_empty(vector.shape, dtype=torch.bool),
        vector.new_empty(shape, dtype=torch.int64),
        vector.new_empty(shape, dtype=torch.bool),
    )


@nnqp_support.register_vmap
def _vmap(info, in_dims, matrix: Tensor, vector: Tensor, solver: str):
    """Solve one larger batch."""

    def batched(x: Tensor, dim: int | None) -> Tensor:
        """Bring the mapped dimension to the front, or add one."""
        if dim is None:
            return x.unsqueeze(0).expand(info.batch_size, *x.shape)
        return x.movedim(dim, 0)

    out = nnqp_support(batched(matrix, in_dims[0]), batched(vector, in_dims[1]), solver)
    return out, (0, 0, 0)


def masked_solver(matrix: Tensor, support: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Factorise `Q` on the support, once.

    Returns:
        The function that solves `Q_FF x_F = b_F` with 0 elsewhere, and whether the rows of the
        support are independent.
    """
    free = support.to(matrix.dtype)
    masked = matrix * free.unsqueeze(-1) * free.unsqueeze(-2) + torch.diag_embed(1 - free)
    factor, info = torch.linalg.cholesky_ex(masked)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)

    def solve(b: Tensor) -> Tensor:
        """Solve on the support."""
        return torch.cholesky_solve(torch.where(support, b, 0.0).unsqueeze(-1), factor).squeeze(-1)

    return solve, (info == 0) & (pivots > RANK_TOL)


def gradient(matrix: Tensor, z: Tensor, vector: Tensor) -> Tensor:
    """Return `Q z + q`."""
    return (matrix @ z.unsqueeze(-1)).squeeze(-1) + vector


def _sign_tol(z: Tensor) -> Tensor:
    """Return the threshold `(..., 1)` under which a sign is rounding."""
    return SIGN_TOL * (1 + z.abs().amax(-1, keepdim=True))


def _block_pivoting(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Guess the support, and flip all indices of the wrong sign at once until there is none.

    Few steps on independent rows; may cycle on dependent ones. A problem that is done, or has
    failed, leaves the batch.

    J. J. Judice, F. M. Pires, A block principal pivoting algorithm for large-scale strictly
    monotone linear complementarity problems, Computers & OR 21, 1994.

    Returns:
        `(support, iterations, done)`.
    """
    n, m = vector.shape
    support = torch.zeros_like(vector, dtype=torch.bool)
    iterations = torch.zeros(n, dtype=torch.int64, device=vector.device)
    done = torch.zeros_like(iterations, dtype=torch.bool)
    place = torch.arange(n, device=vector.device)
    free, fewest, patience = support.clone(), iterations + m + 1, iterations + PATIENCE
    while len(place):
        solve, independent = masked_solver(matrix, free)
        z = solve(-vector)
        wrong = torch.where(free, z, gradient(matrix, z, vector)) < -_sign_tol(z)
        count = wrong.sum(-1)
        patience = torch.where(count < fewest, PATIENCE, patience - 1)
        fewest = torch.minimum(fewest, count)
        support[place], done[place] = free, independent & (count == 0)
        stay = independent & (count > 0) & (patience > 0)
        free = free ^ wrong
        matrix, vector, free, fewest, patience, place = (
            x[stay] for x in (matrix, vector, free, fewest, patience, place)
        )
        iterations[place] += 1
    return support, iterations, done


def _active_set(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Free the steepest unknown, move to the minimum, pin what reaches zero; never go up.

    Ends for every problem: the objective falls with each full move, and a row that depends on
    those already free is never needed.

    C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23.

    Returns:
        `(support, iterations)`.
    """
    support = torch.zeros_like(vector, dtype=torch.bool)
    iterations = torch.zeros(len(vector), dtype=torch.int64, device=vector.device)
    place = torch.arange(len(vector), device=vector.device)
    z, free, banned = torch.zeros_like(vector), support.clone(), support.clone()
    moving = torch.zeros_like(place, dtype=torch.bool)
    for _ in range(10 * vector.shape[-1] + 10):
        slope = torch.where(free | banned, torch.inf, gradient(matrix, z, vector))
        steepest, entering = slope.min(-1)
        stay = moving | (steepest < -_sign_tol(z).squeeze(-1))
        support[place] = free
        matrix, vector, z, free, banned, moving, entering, place = (
            x[stay] for x in (matrix, vector, z, free, banned, moving, entering, place)
        )
        if not len(place):
            break
        iterations[place] += 1
        new = torch.nn.functional.one_hot(entering, z.shape[-1]).bool() & ~moving.unsqueeze(-1)
        z, free, refused, moving = _move(matrix, vector, z, free | new, new)
        banned = torch.where(refused.unsqueeze(-1), banned | new, False)
    return support, iterations


def _move(
    matrix: Tensor, vector: Tensor, z: Tensor, free: Tensor, new: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go towards the minimum over the free unknowns until one of them reaches zero.

    Returns:
        `(z, free, refused, moving)`: a `new` unknown is refused if its row depends on the others
        or it would turn negative at once; `moving` says that the minimum is not reached yet.
    """
    solve, independent = masked_solver(matrix, free)
    target = solve(-vector)
    negative = free & (target <= 0)
    refused = ~independent | (negative & new).any(-1)
    gap = torch.where(negative, z - target, 1.0)
    ratio = torch.where(negative, z / torch.where(gap > 0, gap, 1.0), torch.inf)
    step = ratio.amin(-1, keepdim=True)
    moving = negative.any(-1) & ~refused
    partial = torch.where(free, z + step.clamp(max=1) * (target - z), 0.0)
    moved = torch.where(moving.unsqueeze(-1), partial, target)
    pinned = negative & (ratio <= step) & moving.unsqueeze(-1)
    keep = refused.unsqueeze(-1)
    z = torch.where(keep, z, torch.where(pinned, 0.0, moved))
    return z, torch.where(keep, free & ~new, free & ~pinned), refused, moving


def _reference(matrix: Tensor, vector: Tensor, solver: str) -> Tensor:
    """Ask a solver of qpsolvers, one problem at a time, which unknowns are positive."""
    ridge = RANK_TOL * np.eye(matrix.shape[-1])
    supports = []
    for quadratic, linear in zip(matrix.cpu().numpy(), vector.cpu().numpy(), strict=True):
        found = qpsolvers.solve_qp(
            quadratic + ridge, linear, lb=np.zeros_like(linear), solver=solver
        )
        size = np.zeros_like(linear) if found is None else found
        supports.append(torch.from_numpy(size > np.maximum(quadratic @ size + linear, 0)))
    return torch.stack(supports).to(matrix.device)
