"""How a combinator of weightings wraps an Aggregator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torchjd_func import _check
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting

Rule = TypeVar("Rule", Weighting, Aggregator)


def through_weighting(combinator: str, rule: Rule, wrap: Callable[[Weighting], Weighting]) -> Rule:
    """Wrap a Weighting, or an Aggregator through its weighting: type in = type out."""
    _check.combinable(combinator, rule, (Weighting, Aggregator))
    if isinstance(rule, Weighting):
        return wrap(rule)
    return weighted(wrap(_check.weighting_present(combinator, rule.name, rule.weighting)))
