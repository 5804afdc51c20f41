"""The worst weighted loss: Tchebycheff, its augmented form, and its smooth form.

V. J. Bowman, 1976; R. E. Steuer, E.-U. Choo, 1983; X. Lin et al., Smooth Tchebycheff Scalarization
for Multi-Objective Optimization, ICML 2024, arXiv:2402.19078.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    Vector,
    entries,
    log_mean_exp,
    number,
    optional,
    pure,
    weights_or_uniform,
)

_EPS = 1e-20  # of the multi-task code: y = log(L / nadir + eps)


def _gaps(losses: Tensor, reference: Tensor | None, absolute: bool) -> Tensor:
    """Return the distance of each loss from the reference."""
    gaps = losses - entries("reference", reference, losses, 0.0)
    return gaps.abs() if absolute else gaps


def _weigh(gaps: Tensor, weights: Tensor | None, convention: str) -> Tensor:
    """Multiply or divide by the weights."""
    w = weights_or_uniform(weights, gaps)
    return gaps * w if convention == "multiply" else gaps / w


def _tchebycheff(
    losses: Tensor,
    *,
    weights: Tensor | None,
    reference: Tensor | None,
    convention: str,
    absolute: bool,
) -> Tensor:
    """Take the largest weighted gap."""
    return _weigh(_gaps(losses, reference, absolute), weights, convention).amax()


def _augmented(
    losses: Tensor,
    *,
    weights: Tensor | None,
    reference: Tensor | None,
    convention: str,
    absolute: bool,
    rho: Number,
    augmentation: str,
) -> Tensor:
    """Add a small multiple of the sum to the largest weighted gap."""
    gaps = _gaps(losses, reference, absolute)
    weighted = _weigh(gaps, weights, convention)
    added = weighted if augmentation == "weighted" else gaps
    return weighted.amax() + number(rho, losses) * added.sum()


def _soft_maximum(values: Tensor, mu: Number) -> Tensor:
    """Return `mu log sum exp(values / mu)`."""
    m, width = values.shape[0], number(mu, values)
    return log_mean_exp(values, torch.full_like(values, 1 / m), 1 / width) + width * math.log(m)


def _stch(
    losses: Tensor, *, weights: Tensor | None, reference: Tensor | None, mu: Number
) -> Tensor:
    """Take the soft maximum of the weighted gaps."""
    return _soft_maximum(_weigh(_gaps(losses, reference, False), weights, "multiply"), mu)


def _stch_nadir(losses: Tensor, *, nadir: Tensor, mu: Number) -> Tensor:
    """Take the soft maximum of the logarithms of the losses relative to the nadir."""
    ratio = losses / entries("nadir", nadir, losses, 1.0)
    return losses.shape[0] * _soft_maximum((ratio + _EPS).log(), mu)


def _options(
    weights: Vector | None, reference: Vector | None, convention: str, absolute: bool
) -> dict[str, Any]:
    """Check what the sharp forms have in common."""
    _check.choice("convention", convention, ("multiply", "divide"))
    return {
        "weights": optional("weights", weights),
        "reference": optional("reference", reference),
        "convention": convention,
        "absolute": absolute,
    }


def tchebycheff(
    weights: Vector | None = None,
    reference: Vector | None = None,
    *,
    convention: str = "multiply",
    absolute: bool = False,
) -> Scalarizer:
    r"""Take the largest weighted distance from an ideal point.

    $$s = \max_i w_i (L_i - z_i), \qquad
    \frac{\partial s}{\partial L_i} = w_i \text{ at the largest, 0 elsewhere.}$$

    Every Pareto optimal point is a minimiser for some weights, also where the front is not convex.
    Ties share the gradient evenly.

    Args:
        weights: `w`, `(m,)`, positive; `1/m` by default. A tensor may be vmapped.
        reference: `z`, `(m,)`, the ideal point, below all losses; zeros by default.
        convention: `"multiply"` by the weights; or `"divide"` by them, which seeks the point of the
            front with `L - z` proportional to `w`.
        absolute: Whether to take $|L_i - z_i|$, for a reference that losses may go below.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `convention` is unknown, or a vector is not of the number of objectives.

    Differs from other implementations:
        libmoon returns the raw loss at the maximum, neither weighted nor shifted.

    References:
        V. J. Bowman, On the Relationship of the Tchebycheff Norm and the Efficient Frontier of
        Multiple-Criteria Objectives, 1976, https://doi.org/10.1007/978-3-642-87563-2_5

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.tchebycheff([0.25, 0.75])(torch.tensor([0.5, 3.0]))[0]
        tensor(2.2500)
    """
    options = _options(weights, reference, convention, absolute)
    return pure("tchebycheff", partial(_tchebycheff, **options))


def augmented_tchebycheff(
    weights: Vector | None = None,
    reference: Vector | None = None,
    *,
    rho: Number = 0.05,
    augmentation: str = "weighted",
    convention: str = "multiply",
    absolute: bool = False,
) -> Scalarizer:
    r"""Take the largest weighted distance, plus a little of all of them.

    $$s = \max_i w_i (L_i - z_i) + \rho \sum_i w_i (L_i - z_i), \qquad
    \frac{\partial s}{\partial L_i} = w_i\,(\rho + [i \text{ is the largest}]).$$

    The sum makes minimisers properly Pareto optimal, where those of the maximum alone may be weakly
    so. Ties share the gradient evenly.

    Args:
        weights: As for `tchebycheff`.
        reference: As for `tchebycheff`.
        rho: Share of the sum, at least 0, usually 0.01 to 0.1. A tensor may be vmapped.
        augmentation: Whether the added sum is `"weighted"` or `"unweighted"`.
        convention: As for `tchebycheff`.
        absolute: As for `tchebycheff`.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If an option is unknown, or a vector is not of the number of objectives.

    Differs from other implementations:
        libmoon takes a smooth maximum, with inverted weights.

    References:
        R. E. Steuer, E.-U. Choo, An Interactive Weighted Tchebycheff Procedure for Multiple
        Objective Programming, Math. Program. 26, 1983, https://doi.org/10.1007/BF02591870

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.augmented_tchebycheff([0.2, 0.3, 0.5])(torch.tensor([1.0, 2.0, 4.0]))[0]
        tensor(2.1400)
    """
    _check.choice("augmentation", augmentation, ("weighted", "unweighted"))
    options = _options(weights, reference, convention, absolute)
    options |= {"rho": _check.interval("rho", rho, 0), "augmentation": augmentation}
    return pure("augmented_tchebycheff", partial(_augmented, **options))


def stch(
    mu: Number = 0.1,
    weights: Vector | None = None,
    reference: Vector | None = None,
    *,
    nadir: Vector | None = None,
) -> Scalarizer:
    r"""Take a smooth maximum of the weighted distances from an ideal point.

    $$s = \mu \log \sum_i \exp \frac{w_i (L_i - z_i)}{\mu}, \qquad
    \frac{\partial s}{\partial L_i} = w_i \pi_i, \quad
    \pi = \mathrm{softmax}\Big(\frac{w \circ (L - z)}{\mu}\Big).$$

    Lies between Tchebycheff and Tchebycheff plus $\mu \log m$. With a nadir $\nu$ it is the form
    for multi-task learning, on $y_i = \log(L_i / \nu_i)$ and without weights:
    $s = m \mu \log \sum_i \exp(y_i / \mu)$, with $\mu = 1$ in the authors' code, which first trains
    4 epochs on `log_sum` and takes the average losses of the last of them as $\nu$.

    Args:
        mu: Positive; the smaller, the closer to the maximum. A tensor may be vmapped.
        weights: `w`, `(m,)`, positive; `1/m` by default. A tensor may be vmapped.
        reference: `z`, `(m,)`, the ideal point, below all losses; zeros by default.
        nadir: $\nu$, `(m,)`, positive; takes the place of `weights` and `reference`.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `mu` is not positive, if a vector is not of the number of objectives, or if
            `nadir` comes with weights or a reference.

    Differs from other implementations:
        TorchJD has no default of `mu`, and no nadir.
        LibMTL and the multi-task code do not add the detached maximum back: same gradient, another
        value.

    References:
        X. Lin, X. Zhang, Z. Yang, F. Liu, Z. Wang, Q. Zhang, Smooth Tchebycheff Scalarization for
        Multi-Objective Optimization, ICML 2024, https://arxiv.org/abs/2402.19078

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.stch(1.0, [0.25, 0.75])(torch.tensor([0.5, 3.0]))[0]
        tensor(2.3628)
    """
    _check.interval("mu", mu, 0, open_low=True)
    if nadir is None:
        vectors = {
            "weights": optional("weights", weights),
            "reference": optional("reference", reference),
        }
        return pure("stch", partial(_stch, mu=mu, **vectors))
    if weights is not None or reference is not None:
        raise ValueError(
            "`nadir` must come alone, got weights or a reference beside it. "
            "Drop them: the nadir scales each loss."
        )
    return pure("stch", partial(_stch_nadir, mu=mu, nadir=_check.vector("nadir", nadir)))
