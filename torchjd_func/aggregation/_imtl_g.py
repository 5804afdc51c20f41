"""IMTL-G: equal projections on all gradients.

L. Liu et al., Towards Impartial Multi-task Learning, ICLR 2021; any rank: P. Quinton, V. Rey,
arXiv:2406.16232.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator
from torchjd_func.linalg._gramian import (
    inverse_and_rank,
    rank_tol,
    rows_of,
    sure_inverse,
)


def _weights(
    gramian: Tensor, *, safe: bool, rtol: float | None, present: Tensor | None = None
) -> Tensor:
    """Normalise `G^+ delta` to the sum 1; a row of zeros adds nothing to either."""
    tol = rank_tol(gramian, rtol)
    return _host.call(partial(_normalize, safe=safe, tol=tol), gramian.double())


def _normalize(xp: Any, gramian: Array, *, safe: bool, tol: float) -> Array:
    """Divide by the sum, unless it is rounding."""
    balanced, rounding = _balanced(xp, gramian, tol)
    total = balanced.sum()
    total = abs(total) if safe else total
    defined = abs(total) > rounding
    return xp.where(defined, balanced / xp.where(defined, total, 1.0), 0.0)


def _balanced(xp: Any, gramian: Array, tol: float) -> tuple[Array, Array]:
    """Return `G^+ delta`, with `delta` the norms, and the rounding of the sum of its entries."""
    rows = rows_of(gramian, xp)
    present = xp.sign(rows.norms)
    inverse = sure_inverse(rows.cosines, tol) if xp is np else None
    if inverse is not None:
        regular = rows.inverse * inverse.dot(present)
        return regular, tol * abs(regular).sum()
    # At full rank, G^-1 delta = D^-1 C^-1 1, where the scale of the rows costs no accuracy.
    inverses, full_rank = inverse_and_rank(xp.stack([rows.cosines, gramian]), tol)
    regular, inverse = rows.inverse * (inverses[0] @ present), inverses[1]
    spread = inverse.diagonal().sum() * xp.sqrt(_host.constant(rows.norms @ rows.norms))
    is_regular = full_rank[0]
    balanced = xp.where(is_regular, regular, inverse @ rows.norms)
    rounding = tol * xp.where(is_regular, abs(regular).sum(), spread)
    return balanced, rounding


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
