"""Random weights, new at every call.

B. Lin, F. Ye, Y. Zhang, I. W. Tsang, Reasonable Effectiveness of Random Weighting: A Litmus Test
for Multi-Task Learning, TMLR 2022, arXiv:2111.10603.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Scalarizer
from torchjd_func.random import normal, split
from torchjd_func.scalarization._common import present_softmax


class RandomState(NamedTuple):
    """State of `random`."""

    key: Tensor  # (2,) int64


def _init(losses: Tensor, key: Tensor | None) -> RandomState:
    """Keep the key."""
    return RandomState(_check.key_present("random", key))


def _update(
    losses: Tensor, state: RandomState, *, present: Tensor | None = None
) -> tuple[Tensor, RandomState]:
    """Draw weights on the simplex."""
    _check.state_type("random", state, RandomState)
    next_key, draw = split(state.key)
    weights = present_softmax(normal(draw, losses.shape, dtype=losses.dtype), present)
    return (weights * losses).sum(), RandomState(next_key)


def random() -> Scalarizer:
    r"""Combine the losses with random weights.

    $$s = \sum_i w_i L_i, \qquad w = \mathrm{softmax}(z), \quad z \sim \mathcal N(0, I), \qquad
    \frac{\partial s}{\partial L_i} = w_i.$$

    In expectation it is the mean. The state holds the key.

    Returns:
        The Scalarizer; `init` needs a key.

    Raises:
        ValueError: From `init`, if there is no key.

    Differs from other implementations:
        Others draw from a global generator; here equal keys give equal weights, compiled or not.

    References:
        B. Lin, F. Ye, Y. Zhang, I. W. Tsang, Reasonable Effectiveness of Random Weighting: A Litmus
        Test for Multi-Task Learning, TMLR 2022, https://arxiv.org/abs/2111.10603

    Example:
        >>> import torch, torchjd_func as jd
        >>> losses, scalarizer = torch.tensor([0.5, 3.0]), jd.scalarizers.random()
        >>> scalarizer(losses, scalarizer.init(losses, key=jd.random.key(0)))[0]
        tensor(1.8613)
    """
    return Scalarizer("random", _init, _update)
