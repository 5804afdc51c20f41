"""Euclidean projection on the probability simplex."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _check


def project_simplex(y: Tensor) -> Tensor:
    r"""Project on the probability simplex.

    $\arg\min_{x \ge 0,\ \mathbf 1^\top x = 1} \lVert x - y \rVert$, exact, by sorting.

    Args:
        y: `(..., m)`.

    Returns:
        `(..., m)`, in the dtype of `y`.

    Raises:
        TypeError: If `y` is not floating-point.

    References:
        C. Michelot, A finite algorithm for finding the projection of a point onto the canonical
        simplex of R^n, J. Optim. Theory Appl. 50, 1986.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.linalg.project_simplex(torch.tensor([1.0, 0.5, -2.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    _check.metric("y", y)
    y = y - y.amax(dim=-1, keepdim=True)  # changes nothing but the rounding
    excess = y.sort(dim=-1, descending=True).values.cumsum(dim=-1) - 1
    # What lies below the threshold lowers it: of all numbers of largest entries, the right one
    # gives the largest. Numbers that are not finite give less.
    thresholds = excess / torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    return (y - thresholds.max(dim=-1, keepdim=True).values).clamp(min=0)
