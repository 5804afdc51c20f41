"""Norms and power means of the losses, from the sum to the maximum.

P. L. Yu, A Class of Solutions for Group Decision Problems, Management Science 19(8), 1973.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._names import Vector
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    Numbers,
    entries,
    log_mean_exp,
    number,
    optional,
    pure,
    weights_or_uniform,
)


def _p_norm(
    losses: Tensor,
    *,
    p: Number,
    weights: Vector | None,
    reference: Vector | None,
    present: Tensor | None = None,
) -> Tensor:
    """Take the norm of the weighted gaps relative to the largest of them."""
    gaps = losses - entries("reference", reference, losses, 0.0)
    sizes = only(present, weights_or_uniform(weights, losses, present) * gaps.abs())
    largest, power = sizes.detach().amax(), number(p, losses)
    defined = largest > 0
    relative = sizes / torch.where(defined, largest, 1.0)
    total = torch.where(defined, (relative**power).sum(), 1.0)
    return largest * total ** (1 / power)


def _power_mean(
    losses: Tensor, *, p: Number, weights: Vector | None, present: Tensor | None = None
) -> Tensor:
    """Take the generalised mean in the logarithms of the losses."""
    w = weights_or_uniform(weights, losses, present)
    shares = w / only(present, w).sum()
    return log_mean_exp(losses.log(), shares, number(p, losses), present).exp()


def p_norm(
    p: Number = 2.0, weights: Numbers | None = None, reference: Numbers | None = None
) -> Scalarizer:
    r"""Take a weighted norm of the distance from an ideal point.

    $$s = \Big(\sum_i (w_i |L_i - z_i|)^p\Big)^{1/p}, \qquad \frac{\partial s}{\partial L_i} =
    w_i \Big(\frac{w_i |L_i - z_i|}{s}\Big)^{p-1} \mathrm{sign}(L_i - z_i).$$

    `p = 1` is linear, $p \to \infty$ is Tchebycheff. Where `s` is zero so is its gradient.

    Args:
        p: At least 1, finite. A tensor may be vmapped.
        weights: `w`, `(m,)`, positive; `1/m` by default. A tensor may be vmapped.
        reference: `z`, `(m,)`, the ideal point; zeros by default.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `p` is below 1 or infinite (use `tchebycheff`), or a vector is not of the
            number of objectives.

    Differs from other implementations:
        None.

    References:
        P. L. Yu, A Class of Solutions for Group Decision Problems, Management Science 19(8), 1973,
        https://doi.org/10.1287/mnsc.19.8.936

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.p_norm(2.0, [0.25, 0.75])(torch.tensor([0.5, 3.0]))[0]
        tensor(2.2535)
    """
    options = {
        "p": _check.interval("p", p, 1),
        "weights": optional("weights", weights, low=0),
        "reference": optional("reference", reference),
    }
    return pure("p_norm", partial(_p_norm, **options))


def power_mean(p: Number, weights: Numbers | None = None) -> Scalarizer:
    r"""Take a generalised mean of the losses.

    $$s = \Big(\frac{\sum_i w_i L_i^p}{\sum_i w_i}\Big)^{1/p}, \qquad
    \frac{\partial s}{\partial L_i} = \frac{w_i}{\sum_j w_j} \Big(\frac{L_i}{s}\Big)^{p-1}.$$

    From the minimum ($p \to -\infty$) by the harmonic (`-1`), geometric (`0`, in the limit),
    arithmetic (`1`) and quadratic (`2`) mean to the maximum ($p \to \infty$). Accurate at any `p`,
    however small. Assumes positive losses; `p_norm` allows zeros.

    Args:
        p: Any finite number. A tensor may be vmapped.
        weights: `w`, `(m,)`, positive; equal by default. A tensor may be vmapped.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `p` is infinite, or `weights` is not of the number of objectives.

    Differs from other implementations:
        None.

    References:
        G. H. Hardy, J. E. Littlewood, G. Polya, Inequalities, Cambridge University Press, 1934.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.power_mean(-1.0, [0.25, 0.75])(torch.tensor([0.5, 3.0]))[0]
        tensor(1.3333)
    """
    _check.interval("p", p, -float("inf"), open_low=True)
    return pure(
        "power_mean", partial(_power_mean, p=p, weights=optional("weights", weights, low=0))
    )
