"""Weights that are renewed every few steps.

The `update_weights_every` of A. Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022,
arXiv:2202.01017, for any rule.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._types import State, Weighting
from torchjd_func.combinators._through_weighting import Rule, through_weighting


class EveryState(NamedTuple):
    """The weights in use, and the state of the rule that makes the weights."""

    weights: Tensor  # (m,) float64
    age: Tensor  # (m,) int64, number of calls that used a weight; 0 if it is due
    inner: State


def _init(statistic: Tensor, key: Tensor | None, *, inner: Weighting) -> EveryState:
    """Start without weights: the first call is one that makes some."""
    weights = statistic.new_zeros(statistic.shape[:1], dtype=torch.float64)
    age = torch.zeros_like(weights, dtype=torch.int64)
    return EveryState(weights, age, inner.init_fn(statistic, key))


def _update(
    statistic: Tensor,
    state: EveryState,
    losses: Tensor | None,
    *,
    inner: Weighting,
    k: int | Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, EveryState]:
    """Take the new weights and the new inner state if any are due, else keep the old ones."""
    name = _name(inner)
    _check.state_type(name, state, EveryState)
    _check.state(name, "weights", state.weights, statistic.shape[:1])
    fresh, inner_state = _present.update(inner, statistic, state.inner, losses, present=present)
    here = torch.ones_like(state.age, dtype=torch.bool) if present is None else present
    due = (here & (state.age == 0)).any()
    weights = torch.where(here & due, fresh, state.weights)
    age = torch.where(here, (torch.where(due, 0, state.age) + 1) % k, state.age)
    inner_state = _tree.map(partial(torch.where, due), inner_state, state.inner)
    return weights, EveryState(weights, age, inner_state)


def _name(inner: Weighting) -> str:
    """Return the name of the combination."""
    return f"every({inner.name})"


def _wrap(inner: Weighting, *, k: int | Tensor) -> Weighting:
    """Return the Weighting that keeps its weights for `k` calls."""
    init, update = partial(_init, inner=inner), partial(_update, inner=inner, k=k)
    return Weighting(_name(inner), init, update, inner.needs, inner.widen, inner.robust)


def every(rule: Rule, k: int | Tensor) -> Rule:
    r"""Renew the weights of a rule at every `k`-th call, and reuse them in between.

    $$d_t = J_t^\top w_{k \lfloor t / k \rfloor}, \qquad t = 0, 1, \dots$$

    In between, the state of `rule` stands still as well: a rule with memory or a key sees every
    `k`-th Jacobian only. Guarantees of `rule`, such as not conflicting, hold at the calls that
    renew. The weights are computed at every call and then selected, which keeps the step one graph
    that can be vmapped: this reproduces published methods and saves no time. Where objectives are
    absent at times, a call renews its weights if one of its objectives has none yet, or one that
    was used `k` times. The state holds the weights and the state of `rule`.

    Args:
        rule: A Weighting, or an Aggregator with one.
        k: At least 1, and then `rule` itself.

    Returns:
        A rule of the type of `rule`, needing the same statistic.

    Raises:
        TypeError: If `rule` is neither a Weighting nor an Aggregator.
        ValueError: If the Aggregator has no weighting, or `k` is below 1.

    Differs from other implementations:
        TorchJD, LibMTL and the authors offer this for Nash-MTL alone.

    References:
        A. Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022,
        https://arxiv.org/abs/2202.01017

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.every(jd.mgda(), 2).weighting
        >>> weights, state = rule(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        >>> weights, state = rule(torch.eye(2), state)
        >>> weights
        tensor([0.6000, 0.4000])
    """
    wrap = partial(_wrap, k=_check.interval("k", k, 1))
    return through_weighting("every", rule, wrap)
