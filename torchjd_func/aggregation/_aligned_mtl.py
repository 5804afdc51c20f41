"""Aligned-MTL: independent component alignment.

D. Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023,
arXiv:2305.19000.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg._eigh import eigh
from torchjd_func.linalg._gramian import rank_tol

SCALES = ("min", "median", "rmse")
MARK = 1e-6
# Eigenvalues that differ by this part of the largest have eigenvectors of their own.
DISTINCT = 1e-7


def _weights(
    gramian: Tensor,
    *,
    preference: Vector | None,
    scale: str,
    rtol: float | None,
    present: Tensor | None = None,
) -> Tensor:
    """Combine the aligned rows by the preference."""
    wide, combine = gramian.double(), partial(_combine, scale=scale, tol=rank_tol(gramian, rtol))
    known = wide if present is None else wide - torch.diag(_marks(wide, present))
    return _host.call(combine, known, resolve(preference, wide, present))


def _marks(gramian: Tensor, present: Tensor) -> Tensor:
    """Return small numbers, all different, whose negatives are the eigenvalues of absent rows."""
    # They are dropped. Equal eigenvalues would have no derivative.
    size = gramian.detach().diagonal().sum()
    places = torch.arange(1, len(gramian) + 1, device=gramian.device)
    return torch.where(present, 0.0, MARK * places * torch.where(size > 0, size, 1.0))


def _combine(xp: Any, gramian: Array, combination: Array, *, scale: str, tol: float) -> Array:
    """Align the rows, and combine them."""
    if xp is torch and not _host.unwatched(gramian, combination):
        return _differentiable(gramian, combination, scale, tol)
    eigenvalues, vectors = eigh(gramian)
    return _aligned(xp, eigenvalues, vectors, combination, scale, tol)


def _aligned(
    xp: Any, eigenvalues: Array, vectors: Array, combination: Array, scale: str, tol: float
) -> Array:
    """Combine the aligned rows, given the eigenvalues and eigenvectors of the Gramian."""
    kept = eigenvalues > tol * eigenvalues[-1:]
    roots = xp.where(kept, 1 / xp.sqrt(xp.where(kept, eigenvalues, 1.0)), 0.0)
    aligned = vectors @ (roots * (combination @ vectors))
    return xp.where(kept.any(), _sigma(xp, eigenvalues, kept, scale) * aligned, combination)


def _differentiable(gramian: Tensor, combination: Tensor, scale: str, tol: float) -> Tensor:
    """Align the rows, with a derivative also where eigenvalues are equal."""
    # There eigenvectors have no derivative, but their span has: the first derivative of `G^(-1/2)`
    # is that by divided differences (Ju. L. Daleckii, S. G. Krein, 1965); the second is not known.
    values, vectors = eigh(gramian)
    change = vectors.mT @ (gramian - gramian.detach()) @ vectors  # 0, with a derivative
    moved = values + change.diagonal()
    kept = values > tol * values[-1:]
    roots = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    both = kept & kept.unsqueeze(-1)
    gap = torch.where(kept ^ kept.unsqueeze(-1), values - values.unsqueeze(-1), 1.0)
    sums = torch.where(both, roots + roots.unsqueeze(-1), 1.0)
    inner = -((roots * roots.unsqueeze(-1)).square()) / sums
    slopes = torch.where(both, inner, (roots - roots.unsqueeze(-1)) / gap)
    along = combination @ vectors
    aligned = vectors @ (roots * along + (change * slopes) @ along)
    repeated = torch.where(kept.any(), _sigma(torch, moved, kept, scale) * aligned, combination)
    if gramian.is_cuda:  # where torch.linalg.eigh waits for the host
        return repeated
    apart = (values.diff() > DISTINCT * values[-1:]).all()
    other = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device).diag()
    live, turned = torch.linalg.eigh(torch.where(apart, gramian, other))
    return torch.where(apart, _aligned(torch, live, turned, combination, scale, tol), repeated)


def _sigma(xp: Any, eigenvalues: Array, kept: Array, scale: str) -> Array:
    """Return the common singular value `()` of the aligned rows; `eigenvalues` are ascending."""
    rank, place = kept.sum(), xp.cumsum(kept, 0)
    if scale == "rmse":
        square = xp.where(kept, eigenvalues, 0.0).sum() / xp.clip(rank, 1, None)
    else:
        chosen = kept & (place == (1 if scale == "min" else (rank + 1) // 2))
        square = xp.where(chosen, eigenvalues, 0.0).sum()
    return xp.where(rank > 0, xp.sqrt(xp.where(rank > 0, square, 1.0)), 0.0)


def aligned_mtl(
    preference: Numbers | None = None,
    scale: str = "min",
    *,
    rtol: float | None = None,
) -> Aggregator:
    r"""Combine the gradients after making them orthogonal and of equal length.

    With $G = V \Lambda V^\top$ restricted to the `r` eigenvalues that are not zero,
    $$d = J^\top B b, \qquad B = \sigma V \Lambda^{-1/2} V^\top.$$

    Of all matrices whose non-zero singular values are $\sigma$, the aligned rows $B J$ are the
    closest to `J`. The result may conflict. Under `"min"` it shrinks to nothing as gradients become
    dependent. One eigen-decomposition of an `(m, m)` matrix.

    Args:
        preference: `b`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; uniform weights `1/m` by default. A tensor may
            be vmapped or changed without recompiling.
        scale: $\sigma^2$ is the `"min"`, the lower `"median"`, or (`"rmse"`) the mean of the
            eigenvalues that are not zero.
        rtol: Share of the largest eigenvalue below which an eigenvalue is taken as 0; by default
            `m` times the rounding of the Gramian.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `scale` is unknown, `rtol` is negative, or `preference` is not 1-D, not of
            the number of objectives, or negative.

    Differs from other implementations:
        The paper and LibMTL add the aligned rows (`preference=torch.ones(m)`), TorchJD averages.
        LibMTL and the authors' code use the tolerance of float32, whatever the dtype.

    References:
        D. Senushkin, N. Patakin, A. Kuznetsov, A. Konushin, Independent Component Alignment for
        Multi-Task Learning, CVPR 2023, https://arxiv.org/abs/2305.19000

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.aligned_mtl()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.2133, 0.9673, 0.9673])
    """
    _check.choice("scale", scale, SCALES)
    options = {
        "preference": _check.preference(preference),
        "scale": scale,
        "rtol": _check.interval("rtol", rtol, 0, 1, optional=True, plain=True),
    }
    return weighted(stateless("aligned_mtl", partial(_weights, **options), widen=False))
