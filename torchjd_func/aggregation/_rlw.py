"""RLW: random loss weighting, or RGW, random gradient weighting.

B. Lin, F. Ye, Y. Zhang, I. W. Tsang, Reasonable Effectiveness of Random Weighting,
TMLR 2022, arXiv:2111.10603.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _threefry, random
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting


class RLWState(NamedTuple):
    """The source of the next weights."""

    key: Tensor  # (2,) int64


def _init(statistic: Tensor, key: Tensor | None) -> RLWState:
    """Keep the key."""
    return RLWState(_check.key_present("rlw", key))


def _update(
    statistic: Tensor,
    state: RLWState,
    losses: Tensor | None,
    *,
    present: Tensor | None = None,
) -> tuple[Tensor, RLWState]:
    """Draw weights on the simplex: the softmax of standard normals."""
    _check.state_type("rlw", state, RLWState)
    next_key, words = _threefry.step(state.key, len(statistic), 52)
    normals = random.inverted(words).to(statistic.dtype)
    weights = torch.softmax(_present.only(present, normals, -torch.inf), dim=0)
    return weights, RLWState(next_key)


def rlw() -> Aggregator:
    r"""Weigh the gradients at random, anew at every call.

    $$d = J^\top \operatorname{softmax}(z), \qquad z \sim \mathcal N(0, I_m).$$

    A baseline that more elaborate methods should beat: in expectation it is the mean. May conflict
    with single objectives. The state holds the key; `init` needs one. Costs one backward pass.

    Returns:
        The Aggregator.

    Raises:
        ValueError: If `init` is given no key.

    Differs from other implementations:
        Draws come from the key in the state, not from a global generator.
        Weighting losses (RLW) or gradients (RGW) is the same here, there is one set of parameters.

    References:
        B. Lin, F. Ye, Y. Zhang, I. W. Tsang, Reasonable Effectiveness of Random Weighting: A Litmus
        Test for Multi-Task Learning, TMLR 2022, https://arxiv.org/abs/2111.10603

    Example:
        >>> import torch, torchjd_func as jd
        >>> gramian = torch.eye(2)
        >>> rule = jd.rlw().weighting
        >>> rule(gramian, rule.init(gramian, key=jd.random.key(0)))[0]
        tensor([0.6408, 0.3592])
    """
    return weighted(Weighting("rlw", _init, _update, "size"))
