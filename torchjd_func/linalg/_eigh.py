"""Eigenvalues of small symmetric matrices: of LAPACK on the host, of a kernel on a CUDA device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func._host import Array

LARGEST = 64  # size of a matrix that fits in a kernel's registers; for larger ones CUDA waits


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues `(..., m)`, ascending, and eigenvectors, as constants of derivatives."""
    if isinstance(matrix, np.ndarray):
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors
    fixed = matrix.detach()
    if not fixed.is_cuda:
        values, vectors = torch.linalg.eigh(fixed)
        return values, vectors
    operation = _ON_HOST if fixed.shape[-1] > LARGEST else _IN_KERNEL
    return _host.opaque(operation, _decompose, fixed)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Return eigenvalues `(..., m)`, ascending, differentiably; not-a-number if not finite."""
    if not matrix.is_cuda:
        sound = matrix.isfinite().all(-1).all(-1)
        safe = torch.where(sound[..., None, None], matrix, _host.identity(matrix))
        return torch.where(sound[..., None], torch.linalg.eigvalsh(safe), torch.nan)
    values, vectors = eigh(matrix)
    if _host.unwatched(matrix):
        return values
    return values + (vectors * ((matrix - matrix.detach()) @ vectors)).sum(-2)


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose on a CUDA device, in a kernel what fits one; opaque to compilers.

    Args:
        matrix: `(..., m, m)` float64, symmetric.

    Returns:
        Eigenvalues `(..., m)` and eigenvectors `(..., m, m)`; not-a-number where it is not finite.
    """
    m = matrix.shape[-1]
    if m > LARGEST:
        sound = matrix.isfinite().all(-1).all(-1)
        safe = torch.where(sound[..., None, None], matrix, _host.identity(matrix))
        values, vectors = torch.linalg.eigh(safe)
        bad = torch.where(sound, 0.0, torch.nan)
        return values + bad[..., None], vectors + bad[..., None, None]
    from torchjd_func._kernels.eigh import eigh_kernel  # needs Triton

    shape = matrix.shape
    values, vectors = eigh_kernel(matrix.reshape(math.prod(shape[:-2]), m, m))
    return values.reshape(shape[:-1]), vectors.reshape(shape)


def _fake(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes."""
    return matrix.new_empty(matrix.shape[:-1]), matrix.new_empty(matrix.shape)


# For what fits a kernel, and what waits for the host.
_IN_KERNEL = _host.operation("eigh", _decompose, _fake)
_ON_HOST = _host.operation("eigh_waits", _decompose, _fake, waits=True)
