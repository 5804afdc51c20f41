"""IMTL-G: equal projections on all gradients.

L. Liu et al., Towards Impartial Multi-task Learning, ICLR 2021; any rank: P. Quinton, V. Rey,
arXiv:2406.16232.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator
from torchjd_func.linalg._gramian import (
    Rows,
    inverse_and_rank,
    rank_tol,
    rows_of,
    sure_inverse,
)

Sum = tuple[Array, Array]  # what is added up, and the rounding of its sum


def _weights(
    gramian: Tensor, *, safe: bool, rtol: float | None, present: Tensor | None = None
) -> Tensor:
    """Normalise `G^+ delta` to the sum 1; a row of zeros adds nothing to either."""
    tol, eps = rank_tol(gramian, rtol), len(gramian) * torch.finfo(gramian.dtype).eps
    return _host.call(partial(_normalize, safe=safe, tol=tol, eps=eps), gramian.double())


def _normalize(xp: Any, gramian: Array, *, safe: bool, tol: float, eps: float) -> Array:
    """Divide by the sum, unless it is rounding."""
    balanced, rounding = _balanced(xp, gramian, tol, eps)
    total = balanced.sum()
    total = abs(total) if safe else total
    defined = abs(total) > rounding
    return xp.where(defined, balanced / xp.where(defined, total, 1.0), 0.0)


def _balanced(xp: Any, gramian: Array, tol: float, eps: float) -> Sum:
    """Return `G^+ delta`, with `delta` the norms, and the rounding of the sum of its entries."""
    rows = rows_of(gramian, xp)
    present = xp.sign(rows.norms)
    inverse = sure_inverse(rows.cosines, tol) if xp is np else None
    if inverse is not None:
        return _regular(xp, rows, inverse, present, eps)
    inverses, full_rank = inverse_and_rank(xp.stack([rows.cosines, gramian]), tol)
    parts = zip(
        _regular(xp, rows, inverses[0], present, eps),
        _dependent(xp, gramian, inverses[1], xp.stack([rows.norms, present], -1), eps),
        strict=True,
    )
    balanced, rounding = (xp.where(full_rank[0], *pair) for pair in parts)
    return balanced, rounding


def _regular(xp: Any, rows: Rows, inverse: Array, present: Array, eps: float) -> Sum:
    """Solve at full rank, `G^-1 delta = D^-1 C^-1 1`: the scale of the rows costs no accuracy.

    What a change `E` of the cosines changes in the sum is `(C^-1 D^-1 1)' E C^-1 1`.

    Returns:
        As `_balanced`.
    """
    pair = xp.stack([present, rows.inverse], -1)
    solved = inverse @ pair
    rounding = _of_products(xp, inverse, pair) + _lengths(xp, solved).prod()
    return rows.inverse * solved[:, 0], eps * rounding


def _dependent(xp: Any, gramian: Array, inverse: Array, pair: Array, eps: float) -> Sum:
    """Solve at a lower rank, for `(delta, 1)`.

    What a change `E` of `G` changes in `1'G^+ delta`, at a fixed rank, is (G. H. Golub, V. Pereyra,
    1973) `(G^+ 1)' E G^+ delta`, and of what is beyond the range of `G`, `n` of `1` and `r` of
    `delta`, `n' E (G^+)^2 delta + ((G^+)^2 1)' E r`.

    Returns:
        As `_balanced`.
    """
    first, fixed = inverse @ pair, _host.constant(gramian)
    beyond = pair - fixed @ first
    beyond = beyond - fixed @ (inverse @ beyond)  # the first time leaves rounding
    inside, beyond, twice = (_lengths(xp, x) for x in (first, beyond, inverse @ first))
    size = inside.prod() + beyond[1] * twice[0] + beyond[0] * twice[1]
    rounding = _of_products(xp, inverse, pair) + fixed.diagonal().sum() * size
    return first[:, 0], eps * rounding


def _of_products(xp: Any, inverse: Array, pair: Array) -> Array:
    """Return what products with the inverse may be off by, for a rounding of 1."""
    return _host.constant(inverse).diagonal().sum() * _lengths(xp, pair).prod()


def _lengths(xp: Any, columns: Array) -> Array:
    """Return the lengths of columns, as constants."""
    return xp.sqrt((_host.constant(columns) ** 2).sum(0))


def imtl_g(*, safe: bool = False, rtol: float | None = None) -> Aggregator:
    r"""Combine the gradients so that the result has the same projection on each.

    $$d = J^\top w, \qquad w = \frac{v}{\mathbf 1^\top v}, \qquad v = G^\dagger \delta, \qquad
    \delta_i = \lVert g_i \rVert.$$

    For independent gradients the projections $g_i^\top d / \lVert g_i \rVert$ are equal, and the
    weights, some of which may be negative, sum to 1. If $\mathbf 1^\top v < 0$, which takes three
    objectives, the equal projections are negative: a step uphill for all; see `safe`. For dependent
    gradients the projections differ. Zero where $\mathbf 1^\top v = 0$ up to rounding. One
    pseudo-inverse of an `(m, m)` matrix.

    Args:
        safe: Divide by $|\mathbf 1^\top v|$ instead. Independent gradients then never conflict with
            the result.
        rtol: Share of the largest eigenvalue below which an eigenvalue is taken as 0; by default
            `m` times the rounding of the Gramian.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `rtol` is negative.

    Differs from other implementations:
        The paper's own form is for independent gradients only, where it is the same.
        TorchJD compares $\mathbf 1^\top v$ with 1e-12; here the scale does not matter.

    References:
        L. Liu, Y. Li, Z. Kuang, J.-H. Xue, Y. Chen, W. Yang, Q. Liao, W. Zhang, Towards Impartial
        Multi-task Learning, ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr. Any rank:
        P. Quinton, V. Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
        https://arxiv.org/abs/2406.16232

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.imtl_g()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.0767, 1.0000, 1.0000])
    """
    _check.flag("safe", safe)
    rtol = _check.interval("rtol", rtol, 0, 1, optional=True, plain=True)
    weights_fn = partial(_weights, safe=safe, rtol=rtol)
    return weighted(stateless("imtl_g", weights_fn, widen=False))
