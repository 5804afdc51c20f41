"""Gradient surgery on a CUDA device: PCGrad and GradVac in one launch, without derivatives.

The methods themselves are in their own files, and kernels like them in `_kernels/surgery.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _host


def project(gramian: Tensor, orders: Tensor) -> Tensor:
    """Return the weights of the projected gradients, see `_pcgrad`."""
    return _host.opaque(_pcgrad, _project, gramian, orders).sum(0)


def raise_cosines(
    gramian: Tensor, targets: Tensor, orders: Tensor, *, tol: float
) -> tuple[Tensor, Tensor]:
    """Return the weights of the corrected gradients, and the cosines seen, see `_gradvac`."""
    coordinates, seen = _host.opaque(_gradvac, _raise, gramian, targets, orders, tol)
    return coordinates.sum(0), seen


def _project(gramian: Tensor, orders: Tensor) -> Tensor:
    """Project all rows.

    Args:
        gramian: `(..., m, m)` float64.
        orders: `(..., m, m - 1)` int64.

    Returns:
        The coordinates `(..., m, m)` of the projected gradients.
    """
    from torchjd_func._kernels.surgery import project_kernel  # needs Triton

    k, m = gramian.shape[:-2].numel(), gramian.shape[-1]
    found = project_kernel(gramian.reshape(k, m, m), orders.reshape(k, m, m - 1))
    return found.reshape(gramian.shape)


def _raise(gramian: Tensor, targets: Tensor, orders: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Correct all rows.

    Args:
        gramian: `(..., m, m)` float64.
        targets: `(..., m, m)` float64, the cosines that are aimed at.
        orders: `(..., m, m - 1)` int64.
        tol: Of the squared length of the parts, up to which a gradient cancels.

    Returns:
        The coordinates `(..., m, m)` of the corrected gradients, and the cosines `(..., m, m)`
        that were seen.
    """
    from torchjd_func._kernels.surgery import raise_kernel  # needs Triton

    k, m = gramian.shape[:-2].numel(), gramian.shape[-1]
    flat = gramian.reshape(k, m, m), targets.reshape(k, m, m), orders.reshape(k, m, m - 1)
    coordinates, seen = raise_kernel(*flat, tol)
    return coordinates.reshape(gramian.shape), seen.reshape(gramian.shape)


def _like_first(gramian: Tensor, *others: Tensor | float) -> Tensor:
    """Tell the shape of coordinates."""
    return torch.empty_like(gramian)


def _like_both(gramian: Tensor, *others: Tensor | float) -> tuple[Tensor, Tensor]:
    """Tell the shapes of coordinates and cosines."""
    return torch.empty_like(gramian), torch.empty_like(gramian)


_pcgrad = _host.operation("pcgrad", _project, _like_first)
_gradvac = _host.operation("gradvac", _raise, _like_both)
