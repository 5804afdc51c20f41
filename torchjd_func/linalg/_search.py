"""The search for solutions: one operation that is opaque to compilers, and branches on values.

Which solver serves which device is decided in `dispatch`, and nowhere else.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func._host import Array
from torchjd_func.linalg._device import in_kernel, on_device, takes
from torchjd_func.linalg._interior import minimise
from torchjd_func.linalg._pivoting import around, regular, ridged, share
from torchjd_func.linalg._products import pays
from torchjd_func.linalg._systems import KKT_TOL, RANK_TOL, cut_out, largest, residual, singular
from torchjd_func.linalg._two import solve_two

# Divides by this instead of by zero.
TINY = np.finfo(np.float64).tiny


class Answer(NamedTuple):
    """What was found for each of `N` problems."""

    value: Array  # (N, m); not-a-number if it did not converge
    support: Array  # (N, m) bool
    converged: Array  # (N,) bool
    iterations: Array  # (N,) int64: linear systems solved
    fallback: Array  # (N,) bool: rows are dependent, so a ridge was needed


def dispatch(
    matrix: Tensor, vector: Tensor, ridge: float, solver: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve on a CUDA device, in a kernel what fits one, or else on the host, in numpy.

    Args:
        matrix: `(..., m, m)` float64.
        vector: `(..., m)` float64; as many leading dimensions, each equal or 1.
        ridge: The rounding of the entries of `matrix`, relative to the diagonal.
        solver: As for `nnqp`.

    Returns:
        The fields of `Answer`, for each problem.
    """
    if vector.is_cuda and solver == "auto" and vector.shape[-1] > 0:
        solve = in_kernel if takes(vector) else minimise
        return on_device(solve, matrix.detach(), vector.detach(), ridge)
    return _host.in_numpy(on_host, matrix, vector, ridge, solver)


def _fake(matrix: Tensor, vector: Tensor, ridge: float, solver: str) -> Any:
    """Tell the shapes."""
    shape = torch.broadcast_shapes(matrix.shape[:-2], vector.shape[:-1])
    value = vector.new_empty((*shape, vector.shape[-1]))
    flag = vector.new_empty(shape, dtype=torch.bool)
    return value, value.new_empty(value.shape, dtype=torch.bool), flag, flag.long(), flag.clone()


search = _host.operation("nnqp", dispatch, _fake, broadcasts=True)


@np.errstate(all="ignore")  # what is not finite is said in the answer
def on_host(matrices: Array, vectors: Array, ridge: float, solver: str) -> Answer:
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
    answer = _solve(
        matrices.reshape(math.prod(matrices.shape[:-2]), m, m),
        which.reshape(-1),
        vectors.reshape(math.prod(shape), m),
        ridge,
        solver,
    )
    if len(shape) == 1:
        return answer
    return Answer(*(part.reshape((*shape, *part.shape[1:])) for part in answer))


@np.errstate(all="ignore")  # as above
def nearest_on_host(gramians: Array, ridge: float, solver: str = "auto") -> Answer:
    """Find min-norm points of Gramians `(..., m, m)`; see `nearest`."""
    diagonal = gramians.diagonal(0, -2, -1)
    shortest = np.where(diagonal > 0, diagonal, np.inf).min(axis=-1)[..., None]
    kappa = np.where(shortest < np.inf, shortest, 1.0)
    answer = on_host(gramians + kappa[..., None], 0 * diagonal - kappa, ridge, solver)
    return answer._replace(value=answer.value / answer.value.sum(axis=-1)[..., None])


def _solve(matrices: Array, which: Array, vectors: Array, ridge: float, solver: str) -> Answer:
    """Scale to a unit diagonal and `max|q| = 1`, search, and scale back."""
    if solver == "auto" and vectors.min(initial=0.0) >= 0 and np.isfinite(matrices).all():
        return _nothing_to_do(vectors)
    if solver == "auto" and vectors.size <= 4 and vectors.shape[1] == 2:
        value = solve_two(matrices[which[0]], vectors) if len(matrices) == 1 else None
        if value is not None:
            ones = np.ones(len(value), dtype=np.int64)
            return Answer(value, value > 0, ones > 0, ones, ones < 0)
    diagonal = matrices.diagonal(axis1=1, axis2=2)
    scales = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    unit = matrices * scales[:, :, None] * scales[:, None, :]  # one by one they are in range
    scale = scales if len(scales) == 1 else scales[which]
    linear = vectors * scale
    size = np.maximum(largest(linear), TINY)[:, None]
    linear /= size
    z, support, iterations, fallback = _search(unit, which, linear, ridge, solver)
    met = residual(unit, which, linear, z) <= max(KKT_TOL, 2 * ridge)
    # With a ridge a solution may be as long as the root of one over it; an infinite one is longer.
    sound = met & (largest(z) < ridge**-0.75)
    value = z * (scale * size)
    if not sound.all():
        value[~sound] = np.nan
    return Answer(value, support, sound, iterations, fallback)


def _nothing_to_do(vectors: Array) -> Answer:
    """Return zero, which is the answer where no slope is negative: nothing conflicts."""
    n = len(vectors)
    true, zero = np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64)
    return Answer(0 * vectors, np.zeros(vectors.shape, dtype=bool), true, zero, ~true)


def _search(
    matrices: Array, which: Array, vectors: Array, ridge: float, solver: str
) -> tuple[Array, Array, Array, Array]:
    """Find the solutions: `(z, support, iterations, fallback)`."""
    if solver != "auto":
        support = _reference(matrices, which, vectors, solver)
        z, _ = cut_out(matrices, which, support, -vectors)
        ones = np.ones(len(z), dtype=np.int64)
        return z.clip(min=0), support, ones, ones > 0
    z, support, iterations, done = regular(matrices, which, vectors, ridge)
    left = np.flatnonzero(~done)
    if len(left):
        finite = np.isfinite(matrices).all(axis=(1, 2))[which[left]]
        left = left[finite & np.isfinite(vectors[left]).all(axis=1)]
    dependent = ~done
    if pays(matrices, vectors):  # products solve a system of dependent rows as any other
        dependent |= singular(matrices)[which]
    if share(matrices, vectors[left]):
        part = around(matrices[0], vectors[left], ridge)
        z[left], support[left], extra, done[left], dependent[left] = part
        iterations[left] += extra
        dependent |= ~done
        left = left[~done[left]]
    if len(left):
        used, own = np.unique(which[left], return_inverse=True)
        z[left], support[left], extra = ridged(matrices[used], own, vectors[left], ridge)
        iterations[left] += extra
    return z.clip(min=0), support, iterations, dependent


def _reference(matrices: Array, which: Array, vectors: Array, solver: str) -> Array:
    """Ask a solver of qpsolvers, one problem at a time, which unknowns are positive."""
    import qpsolvers  # takes as long to import as all of this package

    ridge, zero = RANK_TOL * np.eye(vectors.shape[1]), np.zeros(vectors.shape[1])
    support = np.zeros(vectors.shape, dtype=bool)
    for index, (matrix, vector) in enumerate(zip(matrices[which], vectors, strict=True)):
        answer = qpsolvers.solve_qp(matrix + ridge, vector, lb=zero, solver=solver)
        z = zero if answer is None else answer
        support[index] = z > np.maximum(matrix @ z + vector, 0)
    return support
