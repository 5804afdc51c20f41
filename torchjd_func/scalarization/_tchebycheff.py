"""The worst weighted loss: Tchebycheff, and its augmented form.

V. J. Bowman, On the Relationship of the Tchebycheff Norm and the Efficient Frontier of
Multiple-Criteria Objectives, 1976. R. E. Steuer, E.-U. Choo, An Interactive Weighted Tchebycheff
Procedure for Multiple Objective Programming, Math. Program. 26, 1983.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    number,
    optional,
    pure,
    weights_or_uniform,
)


def _gaps(losses: Tensor, reference: Vector | None, absolute: bool) -> Tensor:
    """Return the distance of each loss from the reference."""
    gaps = losses - entries("reference", reference, losses, 0.0)
    return gaps.abs() if absolute else gaps


def _weigh(gaps: Tensor, weights: Vector | None, convention: str, present: Tensor | None) -> Tensor:
    """Multiply or divide by the weights."""
    w = weights_or_uniform(weights, gaps, present)
    return gaps * w if convention == "multiply" else gaps / w


def _tchebycheff(
    losses: Tensor,
    *,
    weights: Vector | None,
    reference: Vector | None,
    convention: str,
    absolute: bool,
    present: Tensor | None = None,
) -> Tensor:
    """Take the largest weighted gap."""
    gaps = _gaps(losses, reference, absolute)
    return only(present, _weigh(gaps, weights, convention, present), -torch.inf).amax()


def _augmented(
    losses: Tensor,
    *,
    weights: Vector | None,
    reference: Vector | None,
    convention: str,
    absolute: bool,
    rho: Number,
    augmentation: str,
    present: Tensor | None = None,
) -> Tensor:
    """Add a small multiple of the sum to the largest weighted gap."""
    gaps = _gaps(losses, reference, absolute)
    weighted = _weigh(gaps, weights, convention, present)
    added = only(present, weighted if augmentation == "weighted" else gaps)
    return only(present, weighted, -torch.inf).amax() + number(rho, losses) * added.sum()


def _options(
    weights: Numbers | None, reference: Numbers | None, convention: str, absolute: bool
) -> dict[str, Any]:
    """Check what the sharp forms have in common."""
    _check.flag("absolute", absolute)
    _check.choice("convention", convention, ("multiply", "divide"))
    return {
        "weights": optional("weights", weights, low=0),
        "reference": optional("reference", reference),
        "convention": convention,
        "absolute": absolute,
    }


def tchebycheff(
    weights: Numbers | None = None,
    reference: Numbers | None = None,
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
    weights: Numbers | None = None,
    reference: Numbers | None = None,
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
