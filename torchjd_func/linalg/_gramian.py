"""Scale-free algebra of Gramians: cosines, and a pseudo-inverse that leaves rounding out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func._host import Array
from torchjd_func.linalg._eigh import eigh


class Rows(NamedTuple):
    """What a Gramian says about rows one by one; a zero row has norm, inverse and cosines 0."""

    cosines: Array  # (..., m, m), of unit diagonal, also at zero rows
    norms: Array  # (..., m)
    inverse: Array  # (..., m), one over the norms


def rows_of(gramian: Array, xp: Any = torch) -> Rows:
    """Split a Gramian into cosines and norms: `G = D C D` with `D` the diagonal of norms."""
    squares = gramian.diagonal(0, -2, -1)
    if xp is torch and gramian.is_cuda and _host.unwatched(gramian):
        return _rows_in_few_launches(gramian, squares)
    if xp is np and squares.min() > 0:  # no row of zeros, the usual case
        norms = np.sqrt(squares)
        inverse = 1 / norms
        return Rows(gramian * inverse[..., :, None] * inverse[..., None, :], norms, inverse)
    positive = squares > 0
    roots = xp.sqrt(xp.where(positive, squares, 1.0))
    inverse = xp.where(positive, 1 / roots, 0.0)
    cosines = gramian * inverse[..., :, None] * inverse[..., None, :]
    filled = xp.where(positive[..., None, :], cosines, _host.identity(gramian))
    return Rows(filled, xp.where(positive, roots, 0.0), inverse)


def _rows_in_few_launches(gramian: Tensor, squares: Tensor) -> Rows:
    """Do the same without regard to derivatives."""
    norms = squares.clamp(min=0).sqrt()
    absent = norms == 0
    inverse = norms.reciprocal().masked_fill(absent, 0)
    cosines = gramian * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    return Rows(cosines + torch.diag_embed(absent.to(gramian.dtype)), norms, inverse)


def rank_tol(gramian: Tensor, rtol: float | None = None) -> float:
    """Return the share of the largest eigenvalue below which an eigenvalue is rounding.

    By default `m` times the rounding of the entries, in the dtype in which they were computed, or
    that of rows in float32, squared, if it is more.
    """
    rounding = max(torch.finfo(gramian.dtype).eps, torch.finfo(torch.float32).eps ** 2)
    return gramian.shape[0] * rounding if rtol is None else rtol


def pseudo_inverse(gramian: Array, tol: float) -> Array:
    """Return pseudo-inverses of symmetric matrices, with eigenvalues up to `tol` taken as 0."""
    if isinstance(gramian, np.ndarray):
        return np.linalg.pinv(gramian, tol, hermitian=True)
    if not gramian.is_cuda:
        return torch.linalg.pinv(gramian, rtol=tol, hermitian=True)
    return _by_eigenvalues(gramian, tol)[0]


def inverse_and_rank(gramian: Array, tol: float) -> tuple[Array, Array]:
    """Return pseudo-inverses, and whether the matrices have full rank `(...,)`."""
    if isinstance(gramian, Tensor) and gramian.is_cuda:
        return _by_eigenvalues(gramian, tol)
    linalg: Any = np.linalg if isinstance(gramian, np.ndarray) else torch.linalg
    eigenvalues = linalg.eigvalsh(_host.constant(gramian))
    return pseudo_inverse(gramian, tol), eigenvalues[..., 0] > tol * eigenvalues[..., -1]


def _by_eigenvalues(gramian: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Do the same by one decomposition, without waiting for a device."""
    values, vectors = eigh(gramian)
    kept = values > tol * values[..., -1:]
    inverse = values.masked_fill(~kept, torch.inf).reciprocal()
    fixed = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    if not _host.unwatched(gramian):
        fixed = fixed + _change_of_inverse(gramian, fixed)
    return fixed, kept[..., 0]


def _change_of_inverse(gramian: Tensor, inverse: Tensor) -> Tensor:
    """Return 0 with the first derivative of the pseudo-inverse, at a fixed rank.

    G. H. Golub, V. Pereyra, The differentiation of pseudo-inverses and nonlinear least squares
    problems whose variables separate, SIAM J. Numer. Anal. 10, 1973.
    """
    change = gramian - gramian.detach()
    beyond = _host.identity(gramian) - inverse @ gramian.detach()
    crossed = inverse @ inverse @ change @ beyond.mT
    return crossed + crossed.mT - inverse @ change @ inverse


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, and give 0 where the denominator is not positive; not-a-number stays."""
    empty = denominator <= 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def sure_inverse(gramian: Array, tol: float) -> Array | None:
    """Return the inverse of an array if norms alone show that it has full rank."""
    try:
        inverse = np.linalg.inv(gramian)
    except np.linalg.LinAlgError:
        return None
    # No eigenvalue is larger than the norm, nor one of the inverse.
    sure = tol * np.linalg.norm(gramian) * np.linalg.norm(inverse) < 1
    return inverse if sure else None
