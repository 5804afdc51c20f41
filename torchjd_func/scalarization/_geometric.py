"""Products of losses: the geometric mean, and the sum of logarithms.

S. Chennupati, G. Sistu, S. Yogamani, S. Rawashdeh, MultiNet++: Multi-Stream Feature Aggregation and
Geometric Loss Strategy for Multi-Task Learning, CVPR Workshops 2019, arXiv:1904.08492.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import Number, count, number, pure


def _geometric_mean(losses: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Take the mean of the logarithms; where a loss is zero the result is a constant zero."""
    zero = losses == 0
    logs = torch.where(zero, 1.0, losses).log()
    product = (only(present, logs).sum() / count(losses, present)).exp()
    return torch.where(zero.any(), 0.0, product)


def _log_sum(losses: Tensor, *, offset: Number, present: Tensor | None = None) -> Tensor:
    """Add the logarithms."""
    return only(present, (losses + number(offset, losses)).log()).sum()


def geometric_mean() -> Scalarizer:
    r"""Take the geometric mean of the losses.

    $$s = \Big(\prod_i L_i\Big)^{1/m}, \qquad \frac{\partial s}{\partial L_i} = \frac{s}{m L_i}.$$

    Multiplying a loss by a constant does not change the direction of the gradient. Assumes positive
    losses: at a zero loss `s` is zero and its gradient, which does not exist, is given as zero; at
    a negative loss `s` is NaN.

    Returns:
        The Scalarizer, without state.

    Differs from other implementations:
        LibMTL multiplies the losses, which may under- or overflow, and logs wrong weights.
        TorchJD raises at a negative loss, and has a NaN gradient at a zero one.

    References:
        S. Chennupati, G. Sistu, S. Yogamani, S. Rawashdeh, MultiNet++: Multi-Stream Feature
        Aggregation and Geometric Loss Strategy for Multi-Task Learning, CVPR Workshops 2019,
        https://arxiv.org/abs/1904.08492

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.geometric_mean()(torch.tensor([1.0, 2.0, 4.0]))[0]
        tensor(2.)
    """
    return pure("geometric_mean", _geometric_mean)


def log_sum(offset: Number = 0.0) -> Scalarizer:
    r"""Add the logarithms of the losses: scale-invariant descent.

    $$s = \sum_i \log(a + L_i), \qquad \frac{\partial s}{\partial L_i} = \frac1{a + L_i}.$$

    With `a = 0` multiplying a loss by a constant changes nothing, and `s + m` is IMTL-L with its
    scales at their optimum. Assumes losses above `-a`.

    Args:
        offset: `a`, at least 0; 1 tempers small losses. A tensor may be vmapped.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `offset` is negative.

    Differs from other implementations:
        The Nash-MTL code has `a = 0`, SamsungLabs' `a = 1`.

    References:
        A. Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022 (baseline SI),
        https://arxiv.org/abs/2202.01017

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.log_sum()(torch.tensor([1.0, 2.0, 4.0]))[0]
        tensor(2.0794)
    """
    return pure("log_sum", partial(_log_sum, offset=_check.interval("offset", offset, 0)))
