"""The mean of gradients that are clipped to a length, as in DP-SGD.

M. Abadi, A. Chu, I. Goodfellow, H. B. McMahan, I. Mironov, K. Talwar, L. Zhang, Deep Learning with
Differential Privacy, CCS 2016, arXiv:1607.00133, Algorithm 1 without its noise.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _host, _present
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator


def _clipped(
    statistic: Tensor, *, max_norm: float | Tensor, present: Tensor | None = None
) -> Tensor:
    """Return `min(1, max_norm / |g_i|) / m`."""
    squares = statistic.diagonal()
    positive = squares > 0
    norms = torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
    limit = _host.number(max_norm, norms)
    scales = torch.where(norms > limit, limit / torch.where(norms > limit, norms, 1.0), 1.0)
    return scales * _present.uniform(present, statistic)


def clipped_mean(max_norm: float | Tensor) -> Aggregator:
    r"""Average the gradients, each clipped to a length first.

    $$d = \frac1m \sum_i g_i \min\Bigl(1, \frac{C}{\lVert g_i \rVert}\Bigr).$$

    No example moves the parameters by more than `C / m`, so that outliers are bounded; with noise
    added, the step of DP-SGD. It needs the norms of the gradients alone, see `jd.row_norms`: with
    `jd.instancewise`, about the price of a plain step.

    Args:
        max_norm: The length `C`, positive; a tensor may be swept.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `max_norm` is not positive.

    Differs from other implementations:
        Opacus sums, adds noise and divides by the expected batch size; here is no noise. Add it as
        `d + sigma * C / m * jd.random.normal(key, ...)`.

    References:
        M. Abadi, A. Chu, I. Goodfellow, H. B. McMahan, I. Mironov, K. Talwar, L. Zhang, Deep
        Learning with Differential Privacy, CCS 2016, https://arxiv.org/abs/1607.00133

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.clipped_mean(1.0)(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))[0]
        tensor([0.3000, 0.6500])
    """
    weights = partial(_clipped, max_norm=_check.interval("max_norm", max_norm, 0, open_low=True))
    return weighted(stateless("clipped_mean", weights, needs="norms"))
