"""PCGrad and GradVac on a GPU: one launch, one program for each gradient that is corrected.

Program `p` corrects row `p % m` of problem `p // m`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchjd_func._kernels.pivoting import _at, padded, start

EPS = tl.constexpr(torch.finfo(torch.float64).eps)


@triton.jit(do_not_specialize=["m"])
def _project(G, ORDERS, OUT, m, M: tl.constexpr):
    """Remove from a row what conflicts with the others, in its order."""
    pid = tl.program_id(0).to(tl.int64)
    own = pid % m
    base = (pid - own) * m
    i = tl.arange(0, M)
    on = i < m
    x = tl.where(i == own, 1.0, 0.0).to(tl.float64)
    for t in range(m - 1):
        j = tl.load(ORDERS + pid * (m - 1) + t)
        row = tl.load(G + base + j * m + i, mask=on, other=0.0)
        square = _at(row, i == j)
        inner = tl.sum(x * row, axis=0)
        removed = tl.where(inner < 0, inner, 0.0) / tl.where(square > 0, square, 1.0)
        x = tl.where(i == j, x - removed, x)
    tl.store(OUT + pid * m + i, x, mask=on)


@triton.jit
def _root(square):
    """Return the square root; 0 where the square is not positive."""
    return tl.where(square > 0, tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)


@triton.jit(do_not_specialize=["m"])
def _raise(G, TARGETS, ORDERS, OUT, SEEN, m, tol, M: tl.constexpr):
    """Raise the cosines of a row with the others, in its order."""
    pid = tl.program_id(0).to(tl.int64)
    own = pid % m
    base = (pid - own) * m
    i = tl.arange(0, M)
    on = i < m
    x = tl.where(i == own, 1.0, 0.0).to(tl.float64)
    pushed = tl.load(G + pid * m + i, mask=on, other=0.0)
    targets = tl.load(TARGETS + pid * m + i, mask=on, other=0.0)
    norms = _root(tl.load(G + base + i * m + i, mask=on, other=0.0))
    seen = targets
    for t in range(m - 1):
        j = tl.load(ORDERS + pid * (m - 1) + t)
        row = tl.load(G + base + j * m + i, mask=on, other=0.0)
        norm = _at(norms, i == j)
        inverse = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
        square = tl.sum(x * pushed, axis=0)
        size = tl.sum(tl.abs(x) * norms, axis=0)
        length = _root(tl.where(square > tol * size * size, square, 0.0))
        phi = tl.sum(x * row, axis=0) * inverse / tl.where(length > 0, length, 1.0)
        phi = tl.minimum(tl.maximum(tl.where(length > 0, phi, 0.0), -1.0), 1.0)
        target = _at(targets, i == j)
        sine = _root(tl.maximum(1.0 - target * target, EPS))
        raised = tl.where(phi < target, target / sine * _root(1.0 - phi * phi) - phi, 0.0)
        added = length * inverse * raised
        x = tl.where(i == j, x + added, x)
        pushed += added * row
        seen = tl.where(i == j, phi, seen)
    tl.store(OUT + pid * m + i, x, mask=on)
    tl.store(SEEN + pid * m + i, seen, mask=on)


def project_kernel(gramians: Tensor, orders: Tensor) -> Tensor:
    """Return coordinates `(k, m, m)` of projected gradients, by orders `(k, m, m - 1)`."""
    k, m, _ = gramians.shape
    out = gramians.new_empty((k, m, m))
    if out.numel():
        arrays = gramians.contiguous(), orders.contiguous(), out
        start(_project, k * m, 1, *arrays, m, padded(m))
    return out


def raise_kernel(
    gramians: Tensor, targets: Tensor, orders: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Return coordinates `(k, m, m)` of corrected gradients, and the cosines they saw."""
    k, m, _ = gramians.shape
    out, seen = gramians.new_empty((k, m, m)), gramians.new_empty((k, m, m))
    arrays = gramians.contiguous(), targets.contiguous(), orders.contiguous(), out, seen
    if out.numel():
        start(_raise, k * m, 1, *arrays, m, tol, padded(m))
    return out, seen
