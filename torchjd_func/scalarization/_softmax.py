"""Exponentially weighted losses: three functions that share the name softmax.

K. Asadi, M. L. Littman, An Alternative Softmax Operator for Reinforcement Learning, ICML 2017,
arXiv:1612.05628.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    count,
    log_mean_exp,
    number,
    present_softmax,
    pure,
)

VARIANTS = ("boltzmann", "detached", "log_sum_exp", "log_mean_exp")


def _softmax(
    losses: Tensor, *, kappa: Number, variant: str, present: Tensor | None = None
) -> Tensor:
    """Average with exponential weights, or take the logarithm of the exponentials."""
    m, sharpness = count(losses, present), number(kappa, losses)
    if variant in ("boltzmann", "detached"):
        weights = present_softmax(sharpness * losses, present)
        return ((weights if variant == "boltzmann" else weights.detach()) * losses).sum()
    mean = log_mean_exp(losses, (1 / m).expand(losses.shape), sharpness, present)
    return mean if variant == "log_mean_exp" else mean + m.log() / sharpness


def softmax(kappa: Number = 1.0, *, variant: str = "boltzmann") -> Scalarizer:
    r"""Emphasise large losses exponentially.

    With $\pi = \mathrm{softmax}(\kappa L)$:

    | `variant` | $s$ | $\partial s / \partial L_i$ |
    |---|---|---|
    | `"boltzmann"` | $\sum_i \pi_i L_i$ | $\pi_i (1 + \kappa (L_i - s))$, may be negative |
    | `"detached"` | $\sum_i \pi_i L_i$ | $\pi_i$, the weights being constants |
    | `"log_sum_exp"` | $\frac1\kappa \log \sum_i e^{\kappa L_i}$ | $\pi_i$ |
    | `"log_mean_exp"` | $\frac1\kappa \log \frac1m \sum_i e^{\kappa L_i}$ | $\pi_i$ |

    The maximum as $\kappa \to \infty$, the minimum as $\kappa \to -\infty$, and at 0 the mean,
    except for `"log_sum_exp"`, which has a pole there.

    Args:
        kappa: Sharpness, finite, in one over the unit of the losses. A tensor may be vmapped.
        variant: Which of the functions.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `variant` is unknown, if `kappa` is infinite, or zero for `"log_sum_exp"`.

    Differs from other implementations:
        None.

    References:
        K. Asadi, M. L. Littman, An Alternative Softmax Operator for Reinforcement Learning,
        ICML 2017, https://arxiv.org/abs/1612.05628. `"log_mean_exp"` is the tilted loss of T. Li,
        A. Beirami, M. Sanjabi, V. Smith, Tilted Empirical Risk Minimization, ICLR 2021,
        https://arxiv.org/abs/2007.01162

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.softmax()(torch.tensor([0.5, 3.0]))[0]
        tensor(2.8104)
    """
    _check.choice("variant", variant, VARIANTS)
    _check.interval("kappa", kappa, -math.inf, open_low=True)
    if variant == "log_sum_exp" and not isinstance(kappa, Tensor) and kappa == 0:
        raise ValueError(
            "`kappa` must not be 0 for variant='log_sum_exp', which has a pole there, got 0. "
            "Use variant='log_mean_exp', which is the mean at 0."
        )
    return pure("softmax", partial(_softmax, kappa=kappa, variant=variant))
