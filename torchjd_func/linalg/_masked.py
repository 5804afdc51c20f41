"""Non-negative quadratic programs without branching on values: for accelerators, and derivatives.

Every problem of a batch does the same work on systems of full size, a fixed number of times; what
is finished is masked. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchjd_func.linalg._proximal import RIDGES
from torchjd_func.linalg._supports import KKT_TOL, LARGEST, RANK_TOL, SIGN_TOL

# Exchanges of all wrong indices at once, before the exact path starts.
EXCHANGES = 12
# Each divides the error of an eigenvalue `a` by `a / 2r`.
REFINEMENTS = 3


def masked_solve(matrix: Tensor, support: Tensor, right: Tensor, dependent: Tensor) -> Tensor:
    """Solve `Q_FF x_F = b_F`, with 0 elsewhere; differentiable at a fixed support."""
    # Where rows may be dependent: the solution of least norm, by `(Q + r)^2 x = Q b`, refined. What
    # `b` has beyond the range of `Q` does not enter.
    # A constant of an exact change of variables, so derivatives need not pass through it.
    scale = _unit_scale(matrix.detach())
    unit = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    ridge = torch.where(dependent, RIDGES[-1], 0.0)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    solve, _ = _factorize(unit + ridge * identity, support)
    right = torch.where(support, right * scale, 0.0)
    x = torch.zeros_like(right)
    for _ in range(REFINEMENTS):
        left = right - _times(unit, x)
        x = x + solve(_times(unit, solve(left)))
    return x * scale


def solve_masked(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve each problem of a batch, float64, with broadcast leading dimensions.

    Returns:
        `value`, `support` `(..., m)`, `converged`, `iterations`, `fallback` `(...,)`.
    """
    scale = _unit_scale(matrix)
    linear = vector * scale
    largest = linear.abs().amax(-1, keepdim=True)
    size = torch.where(largest > 0, largest, 1.0)
    linear = linear / size
    unit = (matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)).expand(*linear.shape, -1)
    z, free, done, iterations = _exchange(unit, linear)
    exact, exact_free, extra = _active_set(unit, linear, done)
    keep = done.unsqueeze(-1)
    z, free = torch.where(keep, z, exact).clamp(min=0), torch.where(keep, free, exact_free)
    residual = torch.minimum(z, _slope(unit, z, linear)).abs().amax(-1)
    longest = z.amax(-1)
    converged = (residual <= KKT_TOL * (1 + longest)) & (longest < LARGEST)
    value = z * scale * size + 0 * residual.unsqueeze(-1)
    return value, free, converged, iterations + extra, ~done


def _unit_scale(matrix: Tensor) -> Tensor:
    """Return the scale of the unknowns that makes the diagonal one."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal > 0, diagonal, 1.0).rsqrt()


def _times(matrix: Tensor, z: Tensor) -> Tensor:
    """Return `Q z`."""
    return (matrix @ z.unsqueeze(-1)).squeeze(-1)


def _slope(matrix: Tensor, z: Tensor, vector: Tensor) -> Tensor:
    """Return `Q z + q`."""
    return _times(matrix, z) + vector


def _factorize(matrix: Tensor, support: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the solver on the support, and whether its rows are independent."""
    both = support.unsqueeze(-1) & support.unsqueeze(-2)
    identity = torch.eye(support.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(both, matrix, identity))
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)

    def solve(right: Tensor) -> Tensor:
        """Solve on the support."""
        masked = torch.where(support, right, 0.0)
        return torch.cholesky_solve(masked.unsqueeze(-1), factor).squeeze(-1)

    return solve, (info == 0) & (pivots > RANK_TOL)


def _exchange(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flip all indices of the wrong sign at once; returns `(z, support, done, iterations)`."""
    free = vector < -SIGN_TOL
    z, done = torch.zeros_like(vector), ~free.any(-1)
    iterations = done.long() * 0
    for _ in range(EXCHANGES):
        solve, independent = _factorize(matrix, free)
        z = torch.where(done.unsqueeze(-1), z, solve(-vector))
        tolerance = SIGN_TOL * (1 + z.abs().amax(-1, keepdim=True))
        wrong = torch.where(free, z, _slope(matrix, z, vector)) < -tolerance
        iterations = iterations + (~done).long()
        done = done | (independent & ~wrong.any(-1))
        free = torch.where(done.unsqueeze(-1), free, free ^ wrong)
    return z, free, done, iterations


def _active_set(matrix: Tensor, vector: Tensor, done: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lawson and Hanson's method as in `_active_set.py`, for `3 m` steps; what is done stays."""
    m = vector.shape[-1]
    z = torch.zeros_like(vector)
    free = torch.zeros_like(vector, dtype=torch.bool)
    banned, moving = free, torch.zeros_like(done)
    iterations = done.long() * 0
    for _ in range(3 * m + 3):
        slope = torch.where(free | banned, torch.inf, _slope(matrix, z, vector))
        steepest, entering = slope.min(-1)
        live = ~done & (moving | (steepest < -SIGN_TOL * (1 + z.abs().amax(-1))))
        iterations = iterations + live.long()
        new = torch.arange(m, device=z.device) == entering.unsqueeze(-1)
        new = new & (live & ~moving).unsqueeze(-1)
        moved, moved_free, refused, still = _move(matrix, vector, z, free | new, new)
        alive = live.unsqueeze(-1)
        banned = torch.where(alive, (banned | new) & refused.unsqueeze(-1), banned)
        z, free = torch.where(alive, moved, z), torch.where(alive, moved_free, free)
        moving = live & still
    return z, free, iterations


def _move(
    matrix: Tensor, vector: Tensor, z: Tensor, free: Tensor, new: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go towards the minimum over the free unknowns; returns `(z, free, refused, moving)`."""
    solve, independent = _factorize(matrix, free)
    target, straight = solve(-vector), independent.unsqueeze(-1)
    toward = torch.where(straight, target - z, _ray(matrix, free & ~new, new))
    falling = free & torch.where(straight, target <= 0, toward < 0)
    ratio = torch.where(falling, z / torch.where(toward < 0, -toward, 1.0), torch.inf)
    step = ratio.amin(-1, keepdim=True)
    blocked = falling.any(-1)
    refused = torch.where(independent, (falling & new).any(-1), ~blocked)
    moving = blocked & ~refused
    taken = torch.where(blocked.unsqueeze(-1), step, 0.0)
    partial = torch.where(free, z + taken * toward, 0.0)
    pinned = falling & (ratio <= step) & moving.unsqueeze(-1)
    moved = torch.where(pinned, 0.0, torch.where(moving.unsqueeze(-1), partial, target))
    keep = refused.unsqueeze(-1)
    kept_free = torch.where(keep, free & ~new, free & ~pinned)
    return torch.where(keep, z, moved), kept_free, refused, moving


def _ray(matrix: Tensor, free: Tensor, new: Tensor) -> Tensor:
    """Return the direction `Q d = 0` in which a new unknown grows, dependent on the free ones."""
    entering = new.to(matrix.dtype)
    solve, _ = _factorize(matrix, free)
    return solve(-_times(matrix, entering)) + entering
