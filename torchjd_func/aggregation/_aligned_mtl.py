"""Aligned-MTL: independent component alignment.

D. Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023,
arXiv:2305.19000.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Aggregator, stateless, weighted
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg._gramian import rank_tol

SCALES = ("min", "median", "rmse")


def _weights(
    gramian: Tensor, *, preference: Tensor | None, scale: str, rtol: float | None
) -> Tensor:
    """Combine the aligned rows by the preference."""
    wide = gramian.to(torch.float64)
    combination = resolve(preference, wide)
    eigenvalues, vectors = torch.linalg.eigh(wide)
    kept = eigenvalues > rank_tol(gramian, rtol) * eigenvalues[-1:]
    roots = torch.where(kept, torch.where(kept, eigenvalues, 1.0).rsqrt(), 0.0)
    aligned = vectors @ (roots * (combination @ vectors))
    return torch.where(kept.any(), _sigma(eigenvalues, kept, scale) * aligned, combination)


def _sigma(eigenvalues: Tensor, kept: Tensor, scale: str) -> Tensor:
    """Return the common singular value `()` of the aligned rows; `eigenvalues` are ascending."""
    m, rank = len(eigenvalues), kept.sum()
    if scale == "rmse":
        square = torch.where(kept, eigenvalues, 0.0).sum() / rank.clamp(min=1)
    else:
        from_smallest = 0 if scale == "min" else (rank - 1) // 2
        index = (m - rank + from_smallest).clamp(max=m - 1)
        square = eigenvalues.gather(0, index.unsqueeze(0)).squeeze(0)
    return torch.where(rank > 0, torch.where(rank > 0, square, 1.0).sqrt(), 0.0)


def aligned_mtl(
    preference: Tensor | Sequence[float] | None = None,
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
        preference: `b`, `(m,)`; uniform weights `1/m` by default. A tensor may be vmapped or
            changed without recompiling.
        scale: $\sigma^2$ is the `"min"`, the lower `"median"`, or (`"rmse"`) the mean of the
            eigenvalues that are not zero.
        rtol: Share of the largest eigenvalue below which an eigenvalue is taken as 0; by default
            `m` times the rounding of the Gramian.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `scale` is unknown, `rtol` is negative, or `preference` is not 1-D or not of
            the number of objectives.

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
        "rtol": _check.interval("rtol", rtol, 0, 1),
    }
    return weighted(stateless("aligned_mtl", partial(_weights, **options), widen=False))
