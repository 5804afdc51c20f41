"""Rules in one line: what a reader of a log wants to know of them."""

import functools
import inspect

import pytest
import torch

import torchjd_func as jd
from tests import registry, scalarizer_registry

RULES = [
    *((jd, name, method.make) for name, method in registry.METHODS.items()),
    *((jd.scalarizers, name, method.make) for name, method in scalarizer_registry.METHODS.items()),
    (jd.sets, "moo_svgd[options]", lambda m: jd.sets.moo_svgd(bandwidth=2.0)),
    (jd.sets, "pareto_mtl", lambda m: jd.sets.pareto_mtl(torch.eye(m))),
    (jd.sets, "hypervolume_gradient", lambda m: jd.sets.hypervolume_gradient(torch.ones(m))),
]
every_rule = pytest.mark.parametrize(
    ("space", "name", "make"), RULES, ids=[f"{space.__name__}.{name}" for space, name, _ in RULES]
)


@every_rule
def test_rules_are_one_line_without_places_in_memory(space, name, make):
    rule = make(5)
    for text in (repr(rule), repr(getattr(rule, "weighting", None) or rule)):
        assert "\n" not in text
        assert " at 0x" not in text
    assert repr(rule).startswith(f"{type(rule).__name__}({registry.exported(name)}")


def changed(signature, args, kwargs) -> list[str]:
    """Return the names of the options, but for rules, that a call sets to no default."""
    bound = signature.bind(*args, **kwargs).arguments
    default = {key: parameter.default for key, parameter in signature.parameters.items()}
    return [
        key
        for key, value in bound.items()
        if key not in ("rule", "aggregator", "weighting")
        and (isinstance(value, torch.Tensor) or value != default[key])
    ]


@every_rule
def test_options_that_are_not_defaults_are_shown(space, name, make, monkeypatch):
    calls = []

    def recorded(factory):
        """Return a factory that notes what it is given."""

        def call(*args, **kwargs):
            calls.extend(changed(inspect.signature(factory), args, kwargs))
            return factory(*args, **kwargs)

        return call

    factories = {registry.exported(name) for _, name, _ in RULES}
    for factory in factories & set(dir(space)):
        monkeypatch.setattr(space, factory, recorded(getattr(space, factory)))
    text = repr(make(5))
    assert all(f"{key}=" in text for key in calls), calls
    assert calls or "=" not in text


def mine(losses, state, *, sharpness, present=None):
    """Sum what a user sharpened."""
    return (sharpness * losses).sum(), state


def test_lines():
    by_label = jd.grouped({"a": jd.upgrad(), "b": jd.mgda("l2")}, jd.by_layer)
    own = jd.Scalarizer("mine", lambda losses, key: (), functools.partial(mine, sharpness=2.0))
    lines = {
        jd.cagrad(): "Aggregator(cagrad)",
        jd.cagrad(0.25): "Aggregator(cagrad, c=0.25)",
        jd.cagrad(torch.tensor(0.25)): "Aggregator(cagrad, c=0.25)",
        jd.cagrad(0.25).weighting: "Weighting(cagrad, c=0.25)",
        jd.upgrad([0.5, 0.25, 0.25]): "Aggregator(upgrad, preference=[0.5, 0.25, 0.25])",
        jd.constant(torch.ones(9)): "Aggregator(constant, weights=tensor of shape (9,))",
        jd.smoothed(jd.mgda("l2"), 0.5): (
            "Aggregator(smoothed(mgda(normalization='l2')), alpha=0.5)"
        ),
        by_label: (
            "Aggregator(grouped({'a': upgrad, 'b': mgda(normalization='l2')}), labels=by_layer)"
        ),
        jd.monitored(jd.upgrad(), {"n": jd.measures.row_norms}): (
            "Aggregator(monitored(upgrad), measures={'n': row_norms})"
        ),
        jd.distributed.data_parallel(jd.smoothed(jd.cagrad(0.25))): (
            "Aggregator(data_parallel(smoothed(cagrad(c=0.25))))"
        ),
        jd.scalarizers.famo(optimizer="sgd"): "Scalarizer(famo, optimizer='sgd')",
        own: "Scalarizer(mine, sharpness=2.0)",
    }
    for rule, line in lines.items():
        assert repr(rule) == line


def test_rules_are_shown_where_numbers_are_not_at_hand():
    seen = []

    def step(c):
        seen.append(repr(jd.cagrad(c)))
        return c

    torch.func.vmap(step)(torch.ones(3))
    assert seen == ["Aggregator(cagrad, c=tensor of shape ())"]


def test_mapped_rules_compile():
    weighting = jd.upgrad([0.5, 0.5]).weighting
    gramians = torch.eye(2).expand(3, 2, 2)
    assert weighting is not None
    step = torch.compile(
        lambda x: torch.func.vmap(weighting)(x)[0], backend="eager", fullgraph=True
    )
    torch.testing.assert_close(step(gramians), torch.func.vmap(weighting)(gramians)[0])
