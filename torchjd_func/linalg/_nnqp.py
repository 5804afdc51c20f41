"""The non-negative quadratic program, and the problems that reduce to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.linalg._pivoting import gradient, masked_solver, nnqp_support

# Largest relative KKT residual of a solution that is called converged.
KKT_TOL = 1e-8


class Solution(NamedTuple):
    """The answer of a solver, one for each problem of the batch."""

    value: Tensor  # (..., m)
    converged: Tensor  # (...,) bool: the relative KKT residual is at most 1e-8
    iterations: Tensor  # (...,) int64: pivots
    fallback: Tensor  # (...,) bool: the fast path failed and the exact path answered


def nnqp(matrix: Tensor, vector: Tensor, *, solver: str = "auto") -> Solution:
    r"""Minimise a convex quadratic over the non-negative orthant.

    $$\arg\min_{z \ge 0} \tfrac12 z^\top Q z + q^\top z, \qquad Q \succeq 0.$$

    Exact up to rounding: the support of the solution is found by block principal pivoting, in
    float64, on the problem scaled to a unit diagonal, and one linear solve gives the value.
    Scaling `matrix`, `vector`, or single unknowns does not change the accuracy. The support is
    locally constant, so the value is differentiable wherever the solution is.

    Args:
        matrix: `Q`, `(..., m, m)`, symmetric positive semi-definite.
        vector: `q`, `(..., m)`. Leading dimensions broadcast against those of `matrix`.
        solver: `"auto"`, or the name of any installed solver of qpsolvers, such as `"quadprog"`,
            which then finds the support, one problem at a time, on the CPU.

    Returns:
        A `Solution`. `converged` is false for a problem that is unbounded below or not finite.

    Raises:
        TypeError: If an argument is not floating-point.
        ValueError: If shapes do not fit, or the solver is not installed.

    References:
        J. J. Judice, F. M. Pires, A block principal pivoting algorithm for large-scale strictly
        monotone linear complementarity problems, Computers & OR 21, 1994.

    Example:
        >>> import torch, torchjd_func as jd
        >>> solution = jd.linalg.nnqp(torch.eye(2), torch.tensor([-2.0, 1.0]))
        >>> solution.value, bool(solution.converged)
        (tensor([2., 0.]), True)
    """
    _check.solver(solver)
    _check.matrix("matrix", matrix)
    _check.floating("`vector`", vector)
    _check.length("vector", vector, matrix.shape[-1])
    dtype = torch.promote_types(matrix.dtype, vector.dtype)
    wide_matrix, wide_vector = matrix.to(torch.float64), vector.to(torch.float64)
    # Constants of an exact change of variables, so derivatives need not pass through them.
    diagonal = wide_matrix.detach().diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    linear = scale * wide_vector
    largest = linear.detach().abs().amax(-1, keepdim=True)
    size = torch.where(largest > 0, largest, 1.0)
    unit_matrix = wide_matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    solution = _solve_scaled(unit_matrix, linear / size, solver)
    return solution._replace(value=(solution.value * scale * size).to(dtype))


def dual_cone_projection(gramian: Tensor, coordinates: Tensor, *, solver: str = "auto") -> Solution:
    r"""Project a combination of rows on the cone of directions that conflict with no row.

    The projection of $J^\top u$ on $\{x : J x \ge 0\}$ is $J^\top v$ with
    $v \in \arg\min_{v \ge u} v^\top G v$, $G = J J^\top$. The smallest such `v` is sought.

    Args:
        gramian: `G`, `(..., m, m)`.
        coordinates: `u`, `(..., m)`; leading dimensions broadcast.
        solver: As for `nnqp`.

    Returns:
        A `Solution` whose value is `v`, `(..., m)`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
        >>> jd.linalg.dual_cone_projection(gramian, torch.tensor([0.0, 1.0])).value
        tensor([1., 1.])
    """
    _check.matrix("gramian", gramian)
    _check.floating("`coordinates`", coordinates)
    _check.length("coordinates", coordinates, gramian.shape[-1])
    wide_gramian, wide = gramian.to(torch.float64), coordinates.to(torch.float64)
    pushed = (wide_gramian @ wide.unsqueeze(-1)).squeeze(-1)
    solution = nnqp(wide_gramian, pushed, solver=solver)
    dtype = torch.promote_types(gramian.dtype, coordinates.dtype)
    return solution._replace(value=(wide + solution.value).to(dtype))


def min_norm_point(gramian: Tensor, *, solver: str = "auto") -> Solution:
    r"""Find the convex combination of the rows with the smallest norm.

    $\arg\min_{w \ge 0,\ \mathbf 1^\top w = 1} w^\top G w$, by the exact reduction to a non-negative
    quadratic program with $Q = G + \kappa \mathbf 1 \mathbf 1^\top$, $q = -\kappa \mathbf 1$.

    Args:
        gramian: `G`, `(..., m, m)`.
        solver: As for `nnqp`.

    Returns:
        A `Solution` whose value is `w`, `(..., m)`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.linalg.min_norm_point(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).value
        tensor([0.7500, 0.2500])
    """
    _check.matrix("gramian", gramian)
    wide = gramian.to(torch.float64)
    diagonal = wide.detach().diagonal(dim1=-2, dim2=-1)
    # The shortest row decides, so its scale is kept; any positive number gives the same answer.
    shortest = torch.where(diagonal > 0, diagonal, torch.inf).amin(-1, keepdim=True)
    kappa = torch.where(shortest.isinf(), 1.0, shortest)
    solution = nnqp(wide + kappa.unsqueeze(-1), -kappa.expand_as(diagonal), solver=solver)
    total = solution.value.sum(-1, keepdim=True)
    return solution._replace(value=(solution.value / total).to(gramian.dtype))


def _solve_scaled(matrix: Tensor, vector: Tensor, solver: str) -> Solution:
    """Solve a problem of unit diagonal and unit `max|q|`: search the support, then one solve."""
    shape = torch.broadcast_shapes(matrix.shape[:-1], vector.shape)
    matrix, vector = matrix.expand(*shape, shape[-1]), vector.expand(shape)
    support, iterations, fallback = nnqp_support(matrix.detach(), vector.detach(), solver)
    solve, _ = masked_solver(matrix, support)
    value = solve(-vector).clamp(min=0)
    residual = torch.minimum(value, gradient(matrix, value, vector)).abs().amax(-1)
    converged = residual <= KKT_TOL * (1 + value.abs().amax(-1))
    return Solution(value, converged, iterations, fallback)
