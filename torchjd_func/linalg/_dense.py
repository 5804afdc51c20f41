"""Small regular systems, without waiting for a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func._host import Array
from torchjd_func.linalg._device import LARGEST

# How many derivatives of a solution are exact: each takes a step of refinement, or of Newton.
ORDERS = 2


def solve(matrix: Array, vector: Array) -> Array:
    """Solve `A x = b`, `(..., m, m)` and `(..., m)`; not finite where `A` is singular."""
    if isinstance(matrix, np.ndarray):
        return solve_arrays(matrix, vector[..., None])[..., 0]
    if not matrix.is_cuda or matrix.shape[-1] > LARGEST:
        return factorized(matrix, vector)
    inverse = _host.opaque(invert, _invert, matrix.detach())
    plain = _host.unwatched(matrix, vector)
    return _refined(matrix, vector, partial(times, inverse), 1 if plain else ORDERS)


def solve_arrays(matrix: Array, right: Array) -> Array:
    """Solve `A X = B`, `(..., m, m)` and `(..., m, k)`; not finite where `A` is singular."""
    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        return torch.linalg.solve_ex(torch.from_numpy(matrix), torch.from_numpy(right))[0].numpy()


def factorized(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solve by a factorisation."""
    # Derivatives of the tangents of torch.linalg.solve miss a term (torch 2.13).
    known = partial(_by_factors, matrix.detach())
    return _refined(matrix, vector, known, 0 if _host.unwatched(matrix, vector) else ORDERS)


def _refined(
    matrix: Tensor, vector: Tensor, known: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """Solve as if the matrix were constant, and let steps of refinement have the derivatives."""
    x = known(vector.detach())
    for _ in range(steps):
        x = x + known(vector - times(matrix, x))
    return x


def _by_factors(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solve with a constant matrix."""
    return torch.linalg.solve_ex(matrix, vector)[0]


def times(matrix: Array, x: Array) -> Array:
    """Return `A x` over batches."""
    return (matrix @ x[..., None])[..., 0]


def factor_on(matrix: Tensor, support: Tensor) -> Tensor:
    """Return the Cholesky factor of a matrix on a support, with the identity elsewhere."""
    both = support.unsqueeze(-1) & support.unsqueeze(-2)
    return torch.linalg.cholesky_ex(torch.where(both, matrix, _host.identity(matrix)))[0]


def solve_on(factor: Tensor, support: Tensor, right: Tensor) -> Tensor:
    """Solve on a support; 0 elsewhere."""
    return solve_factored(factor, torch.where(support, right, 0.0))


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """Solve with a Cholesky factor."""
    # `cholesky_solve` cannot be captured in a CUDA graph (torch 2.13).
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)


def _invert(matrix: Tensor) -> Tensor:
    """Invert on a CUDA device.

    Args:
        matrix: `(..., m, m)` float64.

    Returns:
        `(..., m, m)`; not-a-number where it is singular.
    """
    from torchjd_func._kernels.systems import inverse_kernel  # needs Triton

    m = matrix.shape[-1]
    return inverse_kernel(matrix.reshape(-1, m, m)).reshape(matrix.shape).contiguous()


def _fake(matrix: Tensor) -> Tensor:
    """Tell the shape."""
    return matrix.new_empty(matrix.shape)


invert = _host.operation("inverse", _invert, _fake)
