"""Scale-free algebra of Gramians: cosines, and a pseudo-inverse that leaves rounding out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What a Gramian says about rows one by one; a zero row has norm, inverse and cosines 0."""

    cosines: Tensor  # (m, m), of unit diagonal, also at zero rows
    norms: Tensor  # (m,)
    inverse: Tensor  # (m,), one over the norms


def rows_of(gramian: Tensor) -> Rows:
    """Split a Gramian into cosines and norms: `G = D C D` with `D` the diagonal of norms."""
    squares = gramian.diagonal()
    positive = squares > 0
    safe = torch.where(positive, squares, 1.0)
    inverse = torch.where(positive, safe.rsqrt(), 0.0)
    cosines = gramian * inverse.unsqueeze(-1) * inverse
    filled = cosines + torch.diag_embed((~positive).to(gramian.dtype))
    return Rows(filled, torch.where(positive, safe.sqrt(), 0.0), inverse)


def rank_tol(gramian: Tensor, rtol: float | None = None) -> float:
    """Return the share of the largest eigenvalue below which an eigenvalue is rounding.

    By default `m` times the rounding of the entries, in the dtype in which they were computed.
    """
    return gramian.shape[0] * torch.finfo(gramian.dtype).eps if rtol is None else rtol


def pseudo_inverse(gramian: Tensor, tol: float) -> Tensor:
    """Return the pseudo-inverse of a symmetric matrix, with eigenvalues up to `tol` taken as 0."""
    return torch.linalg.pinv(gramian, rtol=tol, hermitian=True)


def full_rank(gramian: Tensor, tol: float) -> Tensor:
    """Say `()` whether every eigenvalue is above `tol` times the largest."""
    eigenvalues = torch.linalg.eigvalsh(gramian.detach())
    return eigenvalues[..., 0] > tol * eigenvalues[..., -1]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, and give 0 where the denominator is not positive."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)
