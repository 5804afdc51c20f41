"""Small regular systems, without waiting for a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func._host import Array
from torchjd_func.linalg._device import LARGEST


def solve(matrix: Array, vector: Array) -> Array:
    """Solve `A x = b`, `(..., m, m)` and `(..., m)`."""
    if isinstance(matrix, np.ndarray):
        return np.linalg.solve(matrix, vector[..., None])[..., 0]
    if not matrix.is_cuda or matrix.shape[-1] > LARGEST:
        return torch.linalg.solve_ex(matrix, vector)[0]
    inverse = _host.opaque(invert, _invert, matrix.detach())
    x = times(inverse, vector.detach())
    return x + times(inverse, vector - times(matrix, x))


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `A x`."""
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


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
    """Invert in a kernel."""
    from torchjd_func._kernels.systems import inverse_kernel  # needs Triton

    m = matrix.shape[-1]
    return inverse_kernel(matrix.reshape(-1, m, m)).reshape(matrix.shape)


@torch.library.custom_op("torchjd_func::inverse", mutates_args=())
def invert(matrix: Tensor) -> Tensor:
    """Invert on a CUDA device; opaque to compilers.

    Args:
        matrix: `(..., m, m)` float64.

    Returns:
        `(..., m, m)`; not-a-number where it is singular.
    """
    return _invert(matrix).contiguous()


@invert.register_fake
def _fake(matrix: Tensor) -> Tensor:
    """Tell the compiler the shape."""
    return matrix.new_empty(matrix.shape)


@invert.register_vmap
def _vmap(info: Any, in_dims: Any, matrix: Tensor) -> tuple[Tensor, int]:
    """Invert one larger batch."""
    return invert(matrix.movedim(in_dims[0], 0)), 0
