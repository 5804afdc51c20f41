"""The non-negative quadratic program, and the problems that reduce to it."""

import inspect
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func.linalg import _pivoting
from torchjd_func.linalg._masked import masked_solve, solve_masked


class Solution(NamedTuple):
    """The answer of a solver, one for each problem of the batch."""

    value: Tensor
    """`(..., m)`"""
    converged: Tensor
    """`(...,)` bool: the relative KKT residual is at most 1e-8, see `nnqp`"""
    iterations: Tensor
    """`(...,)` int64: linear systems solved"""
    fallback: Tensor
    """`(...,)` bool: the fast path failed and the exact path answered"""


def nnqp(matrix: Tensor, vector: Tensor, *, solver: str = "auto") -> Solution:
    r"""Minimise a convex quadratic over the non-negative orthant.

    $$\arg\min_{z \ge 0} \tfrac12 z^\top Q z + q^\top z, \qquad Q \succeq 0.$$

    Exact up to rounding: the support of the solution is found by block principal pivoting, in
    float64, on the problem scaled to a unit diagonal, and one linear solve gives the value.
    Where that fails, as it may on dependent rows, the proximal point method takes over, and, of
    many solutions, finds the one of least norm; then an active-set method. `fallback` says so.
    A matrix that rounding has given negative eigenvalues is solved to within these.
    Scaling `matrix`, `vector`, or single unknowns does not change the accuracy. The support is
    locally constant, so the value is differentiable wherever the solution is.

    Args:
        matrix: `Q`, `(..., m, m)`, symmetric positive semi-definite.
        vector: `q`, `(..., m)`. Leading dimensions broadcast against those of `matrix`; problems
            that share a matrix this way are solved together.
        solver: `"auto"`, or the name of any installed solver of qpsolvers, such as `"quadprog"`,
            which then finds the support, one problem at a time, on the CPU.

    Returns:
        A `Solution`. `converged` is false for a problem that is unbounded below or not finite; the
        value of the latter is not finite either.

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
    wide = matrix.double(), vector.double()
    return cast(_host.call(partial(solve, solver=solver), *wide), dtype)


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
    _check.matrix("gramian", gramian)
    _check.floating("`coordinates`", coordinates)
    _check.length("coordinates", coordinates, gramian.shape[-1])
    dtype = torch.promote_types(gramian.dtype, coordinates.dtype)
    wide = gramian.double(), coordinates.double()
    return cast(_host.call(partial(_project, solver=solver), *wide), dtype)


def _project(xp: Any, gramian: Array, start: Array, *, solver: str) -> Solution:
    """Solve for `z = v - u`."""
    solution = solve(xp, gramian, (start[..., None, :] @ gramian)[..., 0, :], solver=solver)
    return solution._replace(value=start + solution.value)


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
    found = _host.call(partial(nearest, solver=solver), gramian.double())
    return cast(found, gramian.dtype)


def nearest(xp: Any, gramian: Array, *, solver: str = "auto") -> Solution:
    """Solve with the shift `kappa`; any positive number gives the same answer."""
    diagonal = _host.constant(gramian).diagonal(0, -2, -1)
    # The shortest row decides, so its scale is kept.
    shortest = xp.amin(xp.where(diagonal > 0, diagonal, xp.inf), -1)[..., None]
    kappa = xp.where(shortest < xp.inf, shortest, 1.0)
    linear = 0 * diagonal - kappa
    solution = solve(xp, gramian + kappa[..., None], linear, solver=solver)
    return solution._replace(value=solution.value / solution.value.sum(-1)[..., None])


def cast(solution: Solution, dtype: torch.dtype) -> Solution:
    """Return the value in the dtype of the problem."""
    same = solution.value.dtype == dtype
    return solution if same else solution._replace(value=solution.value.to(dtype))


def solve(xp: Any, matrix: Array, vector: Array, *, solver: str = "auto") -> Solution:
    """Solve a float64 problem, differentiably if it is given as tensors."""
    if xp is np:
        value, _, *flags = _search_arrays(matrix, vector, solver)
        return Solution(value, *flags)
    if matrix.ndim != vector.ndim + 1:
        ndim = max(matrix.ndim - 1, vector.ndim)
        matrix = matrix[(None,) * (ndim + 1 - matrix.ndim)]
        vector = vector[(None,) * (ndim - vector.ndim)]
    if not torch.compiler.is_compiling():
        value, _, *flags = _Differentiable.apply(matrix, vector, solver)
        return Solution(value, *flags)
    # A graph holds no autograd.Function under vmap (torch 2.13), so its value is solved in torch.
    found, support, *flags = search(matrix.detach(), vector.detach(), solver)
    value = masked_solve(matrix, support, -vector, flags[-1])
    return Solution(found + (value - value.detach()), *flags)


def minimize(xp: Any, matrix: Array, vector: Array) -> Array:
    """Return the solution for one float64 problem, as a constant of derivatives."""
    if xp is np:
        return _search_arrays(matrix, vector, "auto").value
    return search(matrix.detach(), vector.detach(), "auto")[0]


@torch.library.custom_op("torchjd_func::nnqp", mutates_args=())
def search(
    matrix: Tensor, vector: Tensor, solver: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve each problem of a batch; opaque to the compiler, since the search branches on values.

    Args:
        matrix: `(..., m, m)` float64.
        vector: `(..., m)` float64; as many leading dimensions, each equal or 1.
        solver: As for `nnqp`.

    Returns:
        `value`, `support` `(..., m)`, `converged`, `iterations`, `fallback` `(...,)`.
    """
    return _search(matrix, vector, solver)


def _search(matrix: Tensor, vector: Tensor, solver: str) -> Any:
    """Hand the problems to numpy; accelerators stay on their device."""
    if matrix.device.type != "cpu" and solver == "auto":
        return solve_masked(matrix, vector)
    answer = _search_arrays(matrix.detach().cpu().numpy(), vector.detach().cpu().numpy(), solver)
    return tuple(_host.tensor(part).to(matrix.device) for part in answer)


def _search_arrays(matrices: Array, vectors: Array, solver: str) -> _pivoting.Answer:
    """Number matrices and problems, and solve them; parts of the answer have their shape."""
    m = vectors.shape[-1]
    if matrices.ndim == 2:
        shape, numbers = vectors.shape[:-1], 0
    else:
        shape = np.broadcast_shapes(matrices.shape[:-2], vectors.shape[:-1])
        numbers = np.arange(math.prod(matrices.shape[:-2])).reshape(matrices.shape[:-2])
    which = np.empty(shape, dtype=np.int64)
    which[...] = numbers
    if vectors.shape[:-1] != shape:
        vectors = np.broadcast_to(vectors, (*shape, m))
    answer = _pivoting.solve(
        matrices.reshape(-1, m, m), which.reshape(-1), vectors.reshape(-1, m), solver
    )
    if len(shape) == 1:
        return answer
    return _pivoting.Answer(*(part.reshape((*shape, *part.shape[1:])) for part in answer))


@search.register_fake
def _fake(matrix: Tensor, vector: Tensor, solver: str) -> Any:
    """Tell the compiler the shapes."""
    shape = torch.broadcast_shapes(matrix.shape[:-2], vector.shape[:-1])
    value = vector.new_empty((*shape, vector.shape[-1]))
    flag = vector.new_empty(shape, dtype=torch.bool)
    return value, value.new_empty(value.shape, dtype=torch.bool), flag, flag.long(), flag.clone()


@search.register_vmap
def _search_vmap(info: Any, in_dims: Any, matrix: Tensor, vector: Tensor, solver: str) -> Any:
    """Solve one larger batch."""
    return search(*align(in_dims, matrix, vector), solver), (0,) * 5


def align(in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """Bring mapped dimensions to the front; tensors that are not mapped get one of size 1."""
    pairs = zip(tensors, in_dims, strict=False)
    return [x.unsqueeze(0) if dim is None else x.movedim(dim, 0) for x, dim in pairs]


class _Differentiable(torch.autograd.Function):
    """The search, with the derivative of the solution at a fixed support."""

    @staticmethod
    def forward(matrix: Tensor, vector: Tensor, solver: str) -> Any:
        """Solve; a plain tensor need not pass through the dispatcher."""
        return (_search if type(matrix) is Tensor else search)(matrix, vector, solver)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what derivatives need."""
        matrix, vector, _ = inputs
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
            return None, None, None
        matrix, value, support, fallback = ctx.saved_tensors
        pulled = masked_solve(matrix, support, -cotangents[0], fallback)
        outer = pulled.unsqueeze(-1) * value.unsqueeze(-2)
        symmetric = (outer + outer.mT) / 2
        return symmetric.sum_to_size(matrix.shape), pulled.sum_to_size(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Push tangents forward: `Q_FF dz = -(dQ z + dq)_F`."""
        matrix, value, support, fallback = ctx.saved_tensors
        d_matrix, d_vector, _ = tangents
        right = torch.zeros_like(value)
        right = right if d_matrix is None else right + (d_matrix @ value.unsqueeze(-1)).squeeze(-1)
        right = right if d_vector is None else right + d_vector
        return masked_solve(matrix, support, -right, fallback), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Solve one larger batch."""
        return _Differentiable.apply(*align(in_dims, *args[:2]), args[2]), (0,) * 5


# `apply` asks for the signature at each call; deriving it takes longer than a small problem.
_Differentiable.forward.__dict__["__signature__"] = inspect.signature(_Differentiable.forward)
