"""Quadratic programs on a CUDA device, where nothing waits for the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchjd_func.linalg._systems import KKT_TOL

LARGEST = 128  # unknowns of a problem that the kernel takes
# Pivots of a unit diagonal, over the ridge, below which rows count as dependent.
DEPENDENT = 1e3


def takes(vector: Tensor, solver: str) -> bool:
    """Say whether the kernel serves problems: on CUDA, of a size that fits in its registers."""
    return vector.is_cuda and solver == "auto" and 0 < vector.shape[-1] <= LARGEST


def on_device(matrix: Tensor, vector: Tensor, ridge: float) -> tuple[Tensor, ...]:
    """Number matrices and problems, and solve them; see `search` for shapes."""
    from torchjd_func.linalg._kernel import solve_kernel  # Triton comes with CUDA builds alone

    m, leading = vector.shape[-1], matrix.shape[:-2]
    shape = torch.broadcast_shapes(leading, vector.shape[:-1])
    numbers = torch.arange(math.prod(leading), device=matrix.device).reshape(leading)
    which = numbers.expand(shape).reshape(-1)
    vectors = vector.expand((*shape, m)).reshape(-1, m)
    solved = solve_kernel(matrix.reshape(-1, m, m), which, vectors, ridge)
    sound = solved.residual <= max(KKT_TOL, 2 * ridge)
    value = torch.where(sound.unsqueeze(-1), solved.value, torch.nan)
    dependent = solved.least < DEPENDENT * ridge
    parts = value, solved.support, sound, solved.pivots.to(torch.int64), dependent
    return tuple(part.reshape((*shape, *part.shape[1:])) for part in parts)
