"""Fixed weights: the mean, the sum, and any constant combination of the losses."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchjd_func import _check
from torchjd_func._names import Vector
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import Numbers, count, entries, pure


def _mean(losses: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Average the losses."""
    return only(present, losses).sum() / count(losses, present)


def _sum(losses: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Add the losses."""
    return only(present, losses).sum()


def _constant(losses: Tensor, *, weights: Vector, present: Tensor | None = None) -> Tensor:
    """Add the weighted losses."""
    return only(present, entries("weights", weights, losses, 1.0) * losses).sum()


def mean() -> Scalarizer:
    r"""Average the losses.

    $$s = \frac1m \sum_i L_i, \qquad \frac{\partial s}{\partial L_i} = \frac1m.$$

    Returns:
        The Scalarizer, without state.

    Differs from other implementations:
        None.

    References:
        V. Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning,
        NeurIPS 2022, https://arxiv.org/abs/2201.04122

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.mean()(torch.tensor([0.5, 3.0]))[0]
        tensor(1.7500)
    """
    return pure("mean", _mean)


def sum() -> Scalarizer:
    r"""Add the losses.

    $$s = \sum_i L_i, \qquad \frac{\partial s}{\partial L_i} = 1.$$

    Returns:
        The Scalarizer, without state.

    Differs from other implementations:
        LibMTL's EW documents the weights 1/m, and uses 1 like this.

    References:
        V. Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning,
        NeurIPS 2022, https://arxiv.org/abs/2201.04122

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.sum()(torch.tensor([1.0, 2.0, 4.0]))[0]
        tensor(7.)
    """
    return pure("sum", _sum)


def constant(weights: Numbers) -> Scalarizer:
    r"""Combine the losses with fixed weights.

    $$s = \sum_i w_i L_i, \qquad \frac{\partial s}{\partial L_i} = w_i.$$

    Nothing is normalised, and weights may be negative. Minimisers for positive weights are Pareto
    optimal, but parts of a front that is not convex are out of reach.

    Args:
        weights: `w`, `(m,)`; a tensor may be vmapped or changed without recompiling.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `weights` is not 1-D, or not of the number of objectives.

    Differs from other implementations:
        None.

    References:
        L. A. Zadeh, Optimality and non-scalar-valued performance criteria, IEEE Trans. Autom.
        Control 8, 1963, https://doi.org/10.1109/TAC.1963.1105511

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.constant([0.25, 0.75])(torch.tensor([0.5, 3.0]))[0]
        tensor(2.3750)
    """
    return pure("constant", partial(_constant, weights=_check.per_loss("weights", weights)))
