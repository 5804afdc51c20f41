"""Rules for loops that are written for TorchJD."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting


def torchjd_aggregator(rule: Aggregator | Weighting, *, key: Tensor | None = None) -> Any:
    """Return an aggregator of TorchJD that is a rule, with the state inside.

    For `torchjd.autojac.jac_to_grad`, after its `backward` or `mtl_backward`, and for loops of
    `torchjd.autogram.Engine`:

        aggregator = jd.interop.torchjd_aggregator(jd.cagrad())
        backward(losses)
        jac_to_grad(model.parameters(), aggregator)

        weights = aggregator.gramian_weighting(engine.compute_gramian(losses))
        losses.backward(weights)

    It is a `GramianWeightedAggregator` if the rule has a weighting, with `.weighting`, of
    Jacobians, and `.gramian_weighting`; else an `Aggregator`. As in TorchJD it is a module that
    changes: `.state` is that of the rule, for `jd.interop.state_dict(rule, aggregator.state)`, and
    may be set; it is not among the module's own `state_dict()`. `.reset()` starts anew.

    TorchJD hands over one matrix and no losses. So a rule that reads losses raises, and
    `jd.grouped` sees one parameter, whose name is empty: make one aggregator for each group.
    `jd.interop.backward_` has neither limit.

    Args:
        rule: An Aggregator; or a Weighting, such as `jd.modo()`, for a cross-Gramian that is handed
            to `.gramian_weighting`.
        key: `(2,)`, from `jd.random.key`, for the first state of a random method.

    Returns:
        The module.

    Raises:
        ImportError: If TorchJD is not installed.
        TypeError: If `rule` is neither; of a Scalarizer, call it, and `backward()` on its loss.

    Example:
        >>> import torch, torchjd_func as jd
        >>> aggregator = jd.interop.torchjd_aggregator(jd.upgrad())
        >>> aggregator(torch.tensor([[1.0, 1.0], [1.0, -2.0]]))
        tensor([ 1.3500, -0.4500])
    """
    _check.rule(rule, (Aggregator, Weighting))
    whole = weighted(rule) if isinstance(rule, Weighting) else rule
    by_gramian, by_rows = _classes()
    if whole.weighting is None:
        return by_rows(whole, key)
    return by_gramian(whole.weighting, key)


class _Holder:
    """What both kinds of module share: a rule, its state, and a key for the first."""

    rule: Any
    state: Any
    key: Tensor | None

    def hold(self, rule: Any, key: Tensor | None) -> None:
        """Start without a state."""
        self.rule, self.state, self.key = rule, None, key

    def reset(self) -> None:
        """Forget the state."""
        self.state = None

    def forward(self, statistic: Tensor, /) -> Tensor:
        """Call the rule, and keep the next state."""
        with torch.no_grad():
            if self.state is None:
                self.state = self.rule.init(statistic, key=self.key)
            result, self.state = self.rule(statistic, self.state)
        return result

    def __repr__(self) -> str:
        """Return the rule in one line."""
        return f"torchjd_aggregator({self.rule!r})"

    __str__ = __repr__


@functools.cache
def _classes() -> tuple[type, type]:
    """Return the two kinds of module, whose bases are there only if TorchJD is."""
    peer = _check.installed("torchjd.aggregation", "torchjd", "jd.interop.torchjd_aggregator")

    class RuleWeighting(_Holder, peer.Weighting):
        """A weighting of Gramians."""

        def __init__(self, rule: Any, key: Tensor | None) -> None:
            super().__init__()
            self.hold(rule, key)

    class RuleAggregator(_Holder, peer.Aggregator):
        """A rule that needs the rows."""

        def __init__(self, rule: Any, key: Tensor | None) -> None:
            super().__init__()
            self.hold(rule, key)

    class GramianRuleAggregator(peer.GramianWeightedAggregator):
        """A rule that needs the Gramian."""

        def __init__(self, rule: Any, key: Tensor | None) -> None:
            super().__init__(RuleWeighting(rule, key))

        @property
        def state(self) -> Any:
            """The state of the rule."""
            return self.gramian_weighting.state

        @state.setter
        def state(self, state: Any) -> None:
            """Go on with another state of the rule."""
            self.gramian_weighting.state = state

        def reset(self) -> None:
            """Forget the state."""
            self.gramian_weighting.reset()

        def __repr__(self) -> str:
            """Return the rule in one line."""
            return repr(self.gramian_weighting)

        __str__ = __repr__

    return GramianRuleAggregator, RuleAggregator
