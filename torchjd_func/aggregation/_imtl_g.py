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
    inverse_and_rank,
    rank_tol,
    rows_of,
    sure_inverse,
)


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


def _balanced(xp: Any, gramian: Array, tol: float, eps: float) -> tuple[Array, Array]:
    """Return `G^+ delta`, with `delta` the norms, and the rounding of the sum of its entries."""
    rows = rows_of(gramian, xp)
    present = xp.sign(rows.norms)
    inverse = sure_inverse(rows.cosines, tol) if xp is np else None
    if inverse is not None:
        balanced = rows.inverse * inverse.dot(present)
        # More than `_changes` can find: what is larger needs no closer look.
        most = 2 * eps * len(gramian) ** 1.5 * np.vdot(inverse, inverse) * rows.inverse.max()
        if abs(balanced.sum()) > most:
            return balanced, most
    # At full rank, G^-1 delta = D^-1 C^-1 1, where the scale of the rows costs no accuracy.
    matrices = xp.stack([rows.cosines, gramian])
    inverses, full_rank = inverse_and_rank(matrices, tol)
    # What is solved for, and what the solution is multiplied by to be summed.
    pairs = xp.stack([present, rows.inverse, rows.norms, present]).reshape(2, 2, -1)
    pairs = xp.swapaxes(pairs, -1, -2)
    solved = inverses @ pairs
    rounding = eps * _changes(xp, matrices, inverses, pairs, solved, full_rank)
    balanced = xp.where(full_rank[0], rows.inverse * solved[0, :, 0], solved[1, :, 0])
    return balanced, xp.where(full_rank[0], rounding[0], rounding[1])


def _changes(
    xp: Any, matrices: Array, inverses: Array, pairs: Array, solved: Array, full_rank: Array
) -> Array:
    """Return what roundings by 1 may change in `b'A^+ a`, for `(..., m, m)` and `(..., m, 2)`.

    A change `E` of `A` changes it, at a fixed rank, by `b'A^+ E A^+ a` and, with `r` and `n` what
    `a` and `b` have beyond the range, `n'E (A^+)^2 a + b'(A^+)^2 E r` (G. H. Golub, V. Pereyra,
    1973). `E` is as large as `A`; where the rank is full, as its entries.
    """
    given = matrices, inverses, pairs, solved
    matrices, inverses, pairs, solved = (_host.constant(x) for x in given)
    beyond = pairs - matrices @ solved
    beyond = beyond - matrices @ (inverses @ beyond)  # the first time leaves rounding
    beyond = xp.where(full_rank[:, None, None], 0.0, beyond)
    parts = xp.stack([pairs, solved, beyond, inverses @ solved])
    lengths = xp.sqrt((parts * parts).sum(-2))
    (own, first), (rest, twice) = lengths[:2].prod(-1), lengths[2:]
    size = xp.where(full_rank, 1.0, matrices.diagonal(0, -2, -1).sum(-1))
    changed = first + (rest * xp.flip(twice, (-1,))).sum(-1)
    return size * changed + inverses.diagonal(0, -2, -1).sum(-1) * own


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
