"""Fixed weights: the mean, the sum, and any constant combination of the gradients."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchjd_func import _check, _names, _present
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator


def _mean(statistic: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Return `1/m` for each objective."""
    return _present.uniform(present, statistic)


def _sum(statistic: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Return 1 for each objective."""
    return statistic.new_full((statistic.shape[0],), 1)


def _constant(statistic: Tensor, *, weights: Vector, present: Tensor | None = None) -> Tensor:
    """Return the given weights."""
    return _names.entries("weights", weights, statistic)


def mean() -> Aggregator:
    r"""Average the gradients: the usual descent on the mean loss.

    $d = \frac1m \sum_i g_i$. May conflict with single objectives. Costs one backward pass.

    Returns:
        The Aggregator, without state.

    Differs from other implementations:
        None.

    References:
        V. Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning,
        NeurIPS 2022, https://arxiv.org/abs/2201.04122

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.mean()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([1., 1., 1.])
    """
    return weighted(stateless("mean", _mean, needs="size"))


def sum() -> Aggregator:
    r"""Add the gradients.

    $d = \sum_i g_i$. May conflict with single objectives. Costs one backward pass.

    Returns:
        The Aggregator, without state.

    Differs from other implementations:
        LibMTL's EW documents the weights 1/m, and uses 1 like this.

    References:
        V. Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning,
        NeurIPS 2022, https://arxiv.org/abs/2201.04122

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.sum()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([2., 2., 2.])
    """
    return weighted(stateless("sum", _sum, needs="size"))


def constant(weights: Numbers) -> Aggregator:
    r"""Combine the gradients with fixed weights.

    $d = \sum_i w_i g_i$; nothing is normalised, and weights may be negative. One-hot weights train
    on a single objective. Costs one backward pass.

    Args:
        weights: `(m,)`, a tensor or list in the order of the losses (of a dict: of their sorted
            names), or a dict by these names; a tensor may be vmapped or changed without
            recompiling.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `weights` is not 1-D, or not of the number of objectives.

    Differs from other implementations:
        None.

    References:
        L. A. Zadeh, Optimality and non-scalar-valued performance criteria, IEEE Trans. Autom.
        Control 8, 1963, https://doi.org/10.1109/TAC.1963.1105511

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.constant([1.0, 2.0])(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([8., 3., 3.])
    """
    weights_fn = partial(_constant, weights=_check.per_loss("weights", weights))
    return weighted(stateless("constant", weights_fn, needs="size"))
