"""PBI: the penalty boundary intersection of MOEA/D.

Q. Zhang, H. Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, IEEE Trans.
Evol. Comput. 11(6), 2007.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchjd_func import _check
from torchjd_func._names import Vector
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    Numbers,
    entries,
    number,
    optional,
    pure,
    weights_or_uniform,
)


def _pbi(
    losses: Tensor,
    *,
    weights: Vector | None,
    reference: Vector | None,
    theta: Number,
    present: Tensor | None = None,
) -> Tensor:
    """Add the penalised distance from the ray to the distance along it."""
    gaps = only(present, losses - entries("reference", reference, losses, 0.0))
    w = only(present, weights_or_uniform(weights, losses, present))
    direction = w / vector_norm(w)
    along = (gaps * direction).sum()
    across = gaps - along * direction
    rounding = 4 * torch.finfo(losses.dtype).eps * vector_norm(gaps.detach())
    off_ray = vector_norm(across.detach()) > rounding
    # The norm of an exact zero has the gradient zero.
    return along + number(theta, losses) * vector_norm(torch.where(off_ray, across, 0.0))


def pbi(
    weights: Numbers | None = None, reference: Numbers | None = None, *, theta: Number = 5.0
) -> Scalarizer:
    r"""Go down along a preferred ray, and stay close to it.

    $$s = d_1 + \theta d_2, \quad d_1 = (L - z)^\top \hat w, \quad
    d_2 = \lVert L - z - d_1 \hat w \rVert, \qquad
    \frac{\partial s}{\partial L} = \hat w + \theta \frac{L - z - d_1 \hat w}{d_2},$$

    with $\hat w = w / \lVert w \rVert$. On the ray itself, to rounding, the second term is zero.
    A large $\theta$ gives negative weights of gradients, and points that are not Pareto optimal.

    Args:
        weights: `w`, `(m,)`, the direction of the ray `L - z`; uniform by default. A tensor may be
            vmapped.
        reference: `z`, `(m,)`, where the ray starts, below all losses; zeros by default.
        theta: Penalty, at least 0. A tensor may be vmapped.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `theta` is negative, or a vector is not of the number of objectives.

    Differs from other implementations:
        TorchJD adds 1e-12 under the root: up to 1e-6 theta more.
        libmoon ignores the reference; its `theta` is 1 by default.

    References:
        Q. Zhang, H. Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition,
        IEEE Trans. Evol. Comput. 11(6), 2007, https://doi.org/10.1109/TEVC.2007.892759

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.pbi([0.25, 0.75], theta=1.0)(torch.tensor([0.5, 3.0]))[0]
        tensor(3.4785)
    """
    options = {
        "weights": optional("weights", weights, low=0),
        "reference": optional("reference", reference),
        "theta": _check.interval("theta", theta, 0),
    }
    return pure("pbi", partial(_pbi, **options))
