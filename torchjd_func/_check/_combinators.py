"""What combinators are given: rules, labels of parameters, and measures."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchjd_func._check._messages import describe, fail


def combinable(combinator: str, value: Any, types: tuple[type, ...]) -> None:
    """Check that a combinator is given a rule of a type that it can wrap."""
    if not isinstance(value, types):
        kinds = " or ".join(f"jd.{kind.__name__}" for kind in types)
        remedy = "Call the factory first, e.g. jd.upgrad()."
        fail(TypeError, f"`{combinator}`", f"be given a {kinds}", repr(value), remedy)
    if getattr(value, "processes", None) is not None:
        remedy = "What jd.distributed makes of a rule is not combined further: wrap it last."
        fail(ValueError, f"`{combinator}`", "be given a rule of one process", repr(value), remedy)


def weighting_present(combinator: str, name: str, weighting: Any) -> Any:
    """Return the weighting that a combinator works through."""
    if weighting is None:
        rule, got = "be given a rule with a weighting", f"`{name}`, which has none"
        remedy = "Wrap a method whose `.weighting` is not None; inside jd.grouped, not around it."
        fail(ValueError, f"`{combinator}`", rule, got, remedy)
    return weighting


def grouping(labels: Sequence[Any], methods: Mapping[Any, Any]) -> None:
    """Check that the labels of the parameters are those that have an aggregator."""
    if set(labels) != set(methods):
        rule = "have one aggregator for each label of the parameters"
        unknown = [label for label in dict.fromkeys(labels) if label not in methods]
        unused = [label for label in methods if label not in labels]
        got = f"none for {unknown}, and unused ones for {unused}"
        fail(ValueError, "`aggregator`", rule, got, "Use the labels that `labels` gives.")


def labelled(missing: Sequence[str], unused: Sequence[str]) -> None:
    """Check that a pytree of labels fits the parameters."""
    if missing or unused:
        got = f"none for {list(missing)}, and no parameters under {list(unused)}"
        rule = "give one label to each parameter, by name or by the start of the name"
        fail(ValueError, "`labels`", rule, got, "Pass a function of the name to label all.")


def labels(value: Any) -> None:
    """Check that labels are no text, which would be one label for all."""
    if isinstance(value, str):
        rule = "be a function of the name of a parameter, or labels by name"
        remedy = "Pass jd.by_layer, jd.by_network or jd.by_tensor; for one group jd.together."
        fail(TypeError, "`labels`", rule, repr(value), remedy)


def label(path: str, value: Any) -> Any:
    """Return a label that can be looked up."""
    if not isinstance(value, Hashable):
        rule, got = "give hashable labels", f"{describe(value)} for {path!r}"
        fail(TypeError, "`labels`", rule, got, "Return a string or a tuple.")
    return value


def distinct(name: str, values: Sequence[str]) -> None:
    """Check that no two of `values`, which are names, are equal."""
    if len(set(values)) < len(values):
        twice = sorted({value for value in values if values.count(value) > 1})
        fail(ValueError, f"`{name}`", "have distinct names", f"two of {twice}", "Rename one.")


def functions(name: str, value: Any) -> None:
    """Check that `value` is a dict of functions."""
    if not isinstance(value, Mapping) or not all(callable(fn) for fn in value.values()):
        remedy = "Pass functions of a jd.Observation, such as jd.measures.weights."
        fail(TypeError, f"`{name}`", "be a dict of functions", repr(value), remedy)


def measure_value(name: str, value: Any) -> Tensor:
    """Return what a measure returned, which is kept in the state."""
    if not isinstance(value, Tensor):
        remedy = "Compute it from the observation by functions of torch alone."
        fail(TypeError, f"`measures[{name!r}]`", "return a tensor", describe(value), remedy)
    return value


def observed(field: str, value: Tensor | None) -> Tensor:
    """Return the part of an observation that a measure cannot do without."""
    if value is None:
        rule = "be there for this measure"
        remedy = "See jd.monitored for what is seen of each rule; in jd.grouped, watch each group."
        fail(ValueError, f"`observation.{field}`", rule, "None", remedy)
    return value


def measured(names: Sequence[str]) -> None:
    """Check that a state holds measures."""
    if not names:
        fail(ValueError, "`state`", "hold measures", "none", "Wrap the rule in jd.monitored.")
