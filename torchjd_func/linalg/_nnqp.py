"""The non-negative quadratic program, and the problems that reduce to it."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func.linalg._dense import factor_on, solve_on, times
from torchjd_func.linalg._search import dispatch, nearest_on_host, on_host, search

# What is added to a unit diagonal where rows are dependent, by the dtype in which the matrix was
# computed; see `_pivoting.py`. The eigenvalues of the rounding of float32 are up to 1.5e-8 m, seen
# at m = 16 to 1024 for rows whose singular values decay; that of float64 is far from its ridge.
RIDGES = {torch.float64: 1e-11}
NARROW_RIDGE, NARROW_ROWS = 1e-6, 32
# The same for derivatives where rows are dependent, and how often that is refined: each time
# divides the error of an eigenvalue `a` by `a / 2r`.
SLOPE_RIDGE, REFINEMENTS = 1e-6, 3


class Solution(NamedTuple):
    """The answer of a solver, one for each problem of the batch."""

    value: Tensor
    """`(..., m)`"""
    converged: Tensor
    """`(...,)` bool: the relative KKT residual is at most 1e-8, see `nnqp`"""
    iterations: Tensor
    """`(...,)` int64: linear systems solved"""
    fallback: Tensor
    """`(...,)` bool: rows are dependent, or nearly, and a ridge was needed"""


def nnqp(matrix: Tensor, vector: Tensor, *, solver: str = "auto") -> Solution:
    r"""Minimise a convex quadratic over the non-negative orthant.

    $$\arg\min_{z \ge 0} \tfrac12 z^\top Q z + q^\top z, \qquad Q \succeq 0.$$

    Exact up to rounding: the support of the solution is found by block principal pivoting, in
    float64, on the problem scaled to a unit diagonal, and one linear solve gives the value.
    Where rows are dependent, or nearly, a ridge of the size of the rounding of `matrix` (1e-11 of
    the diagonal; if its dtype is float32 or less, 1e-6, or 3e-8 m if that is more) makes the
    solution unique and bounds it: of many solutions the one of least norm, for unknowns scaled by
    the roots of the diagonal, is found. `fallback` says so. Scaling `matrix`, `vector`, or single
    unknowns does not change the accuracy. The support is locally constant, so the value is
    differentiable wherever the solution is.

    Args:
        matrix: `Q`, `(..., m, m)`, symmetric positive semi-definite.
        vector: `q`, `(..., m)`. Leading dimensions broadcast against those of `matrix`; problems
            that share a matrix this way are solved together.
        solver: `"auto"`, or the name of any installed solver of qpsolvers, such as `"quadprog"`,
            which then finds the support, one problem at a time, on the CPU.

    Returns:
        A `Solution`. `converged` is false for a problem that is unbounded below or not finite; its
        value is not-a-number.

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
    dtype = _checked("matrix", matrix, "vector", vector)
    return cast(solve(matrix.double(), vector.double(), ridge_of(matrix), solver), dtype)


def dual_cone_projection(gramian: Tensor, coordinates: Tensor, *, solver: str = "auto") -> Solution:
    r"""Project a combination of rows on the cone of directions that conflict with no row.

    The projection of $J^\top u$ on $\lbrace x : J x \ge 0 \rbrace$ is $J^\top v$ with
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
    _check.solver(solver)
    dtype = _checked("gramian", gramian, "coordinates", coordinates)
    matrix, start = gramian.double(), coordinates.double()
    eps, ridge = torch.finfo(gramian.dtype).eps, ridge_of(gramian)
    known = _host.arrays(matrix, start)
    if known is not None:
        with np.errstate(all="ignore"):  # what is not finite is seen in the result
            products = products_with(*known, eps=eps, xp=np)
        solution = _solved(on_host(known[0], products, ridge, solver))
    else:
        solution = solve(matrix, products_with(matrix, start, eps), ridge, solver)
    return cast(solution._replace(value=start + solution.value), dtype)


def _checked(matrix_name: str, matrix: Tensor, vector_name: str, vector: Tensor) -> torch.dtype:
    """Check a problem, and return the dtype of its solution."""
    _check.matrix(matrix_name, matrix)
    _check.floating(f"`{vector_name}`", vector)
    _check.length(vector_name, vector, matrix.shape[-1])
    _check.one_device(f"`{matrix_name}, {vector_name}`", [matrix, vector])
    return torch.promote_types(matrix.dtype, vector.dtype)


def products_with(gramian: Array, coordinates: Array, eps: float, xp: Any = torch) -> Array:
    """Return the products of the rows with `J'u`, 0 where only rounding is left of them.

    Rounding alone has no solution: it is not of the form `G u`.
    """
    vector = (coordinates[..., None, :] @ gramian)[..., 0, :]
    sizes = xp.sqrt(_host.constant(gramian).diagonal(0, -2, -1).clip(min=0))
    terms = (abs(_host.constant(coordinates)) * sizes).sum(-1)[..., None]
    rounding = gramian.shape[-1] * eps * sizes * terms
    return _host.filled(vector, abs(_host.constant(vector)) <= rounding, 0.0)


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
    _check.solver(solver)
    _check.matrix("gramian", gramian)
    solution = nearest(gramian.double(), ridge_of(gramian), solver)
    return cast(solution, gramian.dtype)


def nearest(gramian: Tensor, ridge: float, solver: str = "auto") -> Solution:
    """Solve with the shift `kappa`; any positive number gives the same answer."""
    known = _host.numbers(gramian)
    if known is not None:
        return _solved(nearest_on_host(known, ridge, solver))
    diagonal = gramian.detach().diagonal(0, -2, -1)
    # The shortest row decides, so its scale is kept.
    shortest = diagonal.masked_fill(diagonal <= 0, torch.inf).amin(-1, keepdim=True)
    kappa = shortest.masked_fill(shortest == torch.inf, 1.0)
    solution = solve(gramian + kappa.unsqueeze(-1), 0 * diagonal - kappa, ridge, solver)
    return solution._replace(value=solution.value / solution.value.sum(-1, keepdim=True))


def ridge_of(matrix: Tensor) -> float:
    """Return the ridge for a matrix in the dtype in which it was computed."""
    rounding = NARROW_RIDGE * max(1.0, matrix.shape[-1] / NARROW_ROWS)
    return RIDGES.get(matrix.dtype, rounding)


def cast(solution: Solution, dtype: torch.dtype) -> Solution:
    """Return the value in the dtype of the problem."""
    same = solution.value.dtype == dtype
    return solution if same else solution._replace(value=solution.value.to(dtype))


def _solved(parts: Any) -> Solution:
    """Return what a search found, without the supports."""
    value, _, *flags = map(_host.tensor, parts)
    return Solution(value, *flags)


def solve(matrix: Tensor, vector: Tensor, ridge: float, solver: str = "auto") -> Solution:
    """Solve a float64 problem, differentiably."""
    known = _host.arrays(matrix, vector)
    if known is not None:
        return _solved(on_host(*known, ridge=ridge, solver=solver))
    if matrix.ndim != vector.ndim + 1:
        ndim = max(matrix.ndim - 1, vector.ndim)
        matrix = matrix[(None,) * (ndim + 1 - matrix.ndim)]
        vector = vector[(None,) * (ndim - vector.ndim)]
    if _host.unwatched(matrix, vector):
        return _solved(_host.opaque(search, dispatch, matrix, vector, ridge, solver))
    if not (torch.compiler.is_compiling() or _host.pushed(matrix) or _host.pushed(vector)):
        return _solved(_Differentiable.apply(matrix, vector, ridge, solver))
    # A graph holds no autograd.Function under vmap, and one that is pushed forward twice has a
    # second derivative of 0 (torch 2.13), so the value is solved in torch.
    best, support, *flags = search(matrix.detach(), vector.detach(), ridge, solver)
    value = masked_solve(matrix, support, -vector, flags[-1], ridge)
    # What has no derivative here has a value all the same.
    known = torch.where(value.isfinite(), value, 0.0)
    return Solution(best + (known - known.detach()), *flags)


def masked_solve(
    matrix: Tensor, support: Tensor, right: Tensor, dependent: Tensor, ridge: float
) -> Tensor:
    """Solve `Q_FF x_F = b_F`, with 0 elsewhere; differentiable at a fixed support."""
    # By `(Q + r)^2 x = Q b`, refined: the solution of least norm where rows are dependent. What `b`
    # has beyond the range of `Q` does not enter. Less than the rounding of `Q` would not do: a
    # matrix whose supports can be solved on may have eigenvalues below 0.
    # A constant of an exact change of variables, so derivatives need not pass through it.
    diagonal = matrix.detach().diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    unit = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    added = torch.where(dependent, max(SLOPE_RIDGE, ridge), ridge)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = factor_on(unit + added * identity, support)
    right = torch.where(support, right * scale, 0.0)
    x = torch.zeros_like(right)
    for _ in range(REFINEMENTS):
        left = solve_on(factor, support, right - times(unit, x))
        x = x + solve_on(factor, support, times(unit, left))
    return x * scale


class _Differentiable(torch.autograd.Function):
    """The search, with the derivative of the solution at a fixed support."""

    @staticmethod
    def forward(matrix: Tensor, vector: Tensor, ridge: float, solver: str) -> Any:
        """Solve; a plain tensor need not pass through the dispatcher."""
        plain = type(matrix) is Tensor and not matrix.is_meta
        return (dispatch if plain else search)(matrix, vector, ridge, solver)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what derivatives need."""
        matrix, vector, ctx.ridge, _ = inputs
        value, support, *flags = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(support, *flags)
        ctx.save_for_backward(matrix, value, support, flags[-1])
        ctx.save_for_forward(matrix, value, support, flags[-1])
        ctx.shape = vector.shape

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Pull a cotangent of the value back: `Q_FF x = -c_F` gives both."""
        if cotangents[0] is None:
            return None, None, None, None
        matrix, value, support, fallback = ctx.saved_tensors
        pulled = masked_solve(matrix, support, -cotangents[0], fallback, ctx.ridge)
        outer = pulled.unsqueeze(-1) * value.unsqueeze(-2)
        symmetric = (outer + outer.mT) / 2
        return symmetric.sum_to_size(matrix.shape), pulled.sum_to_size(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Push tangents forward: `Q_FF dz = -(dQ z + dq)_F`."""
        matrix, value, support, fallback = ctx.saved_tensors
        d_matrix, d_vector, *_ = tangents
        right = torch.zeros_like(value)
        right = right if d_matrix is None else right + (d_matrix @ value.unsqueeze(-1)).squeeze(-1)
        right = right if d_vector is None else right + d_vector
        pushed = masked_solve(matrix, support, -right, fallback, ctx.ridge)
        return pushed, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Solve one larger batch."""
        return _Differentiable.apply(*_host.aligned(1, in_dims, *args)), (0,) * 5


# `apply` asks for the signature at each call; deriving it takes longer than a small problem.
_Differentiable.forward.__dict__["__signature__"] = inspect.signature(_Differentiable.forward)
