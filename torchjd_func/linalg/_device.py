"""Quadratic programs on a CUDA device, where nothing waits for the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjd_func.linalg._systems import KKT_TOL

LARGEST = 128  # unknowns of a problem that a kernel takes; more do not fit in its registers


def takes(vector: Tensor) -> bool:
    """Say whether a kernel serves problems: on CUDA, of a size that fits in its registers."""
    return vector.is_cuda and 0 < vector.shape[-1] <= LARGEST


def in_kernel(matrices: Tensor, vectors: Tensor, ridge: float) -> tuple[Tensor, ...]:
    """Solve `(n, m)` problems of which each `n / k` in turn share a matrix."""
    from torchjd_func._kernels.quadratic import solve_kernel  # needs Triton

    return tuple(solve_kernel(matrices, vectors, ridge, max(KKT_TOL, 2 * ridge)))


def on_device(
    solve: Callable[..., tuple[Tensor, ...]], matrix: Tensor, vector: Tensor, ridge: float
) -> Any:
    """Number matrices and problems, and solve them; see `search` for shapes."""
    m = vector.shape[-1]
    if matrix.ndim == 3 and vector.ndim == 2 and len(matrix) == 1:  # problems share a matrix
        return solve(matrix, vector, ridge)
    shape = torch.broadcast_shapes(matrix.shape[:-2], vector.shape[:-1])
    vectors = vector.expand((*shape, m)).reshape(math.prod(shape), m)
    solved = solve(_prefix(matrix, shape), vectors, ridge)
    if len(shape) == 1:
        return solved
    return tuple(part.reshape((*shape, *part.shape[1:])) for part in solved)


def _prefix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return matrices `(k, m, m)` of which each serves as many problems, in turn."""
    m, leading = matrix.shape[-1], matrix.shape[:-2]
    leading = (1,) * (len(shape) - len(leading)) + leading
    shared = next((i for i, size in enumerate(leading) if size != shape[i]), len(shape))
    if any(size > 1 for size in leading[shared:]):
        return matrix.expand((*shape, m, m)).reshape(math.prod(shape), m, m)
    return matrix.reshape(math.prod(leading), m, m)
