"""Numbers for the objectives by the names of the losses."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import compiled
from tests.matrices import matrix
from torchjd_func import _names

NUMBERS = {"edges": 2.0, "depth": 1.0, "labels": 0.5}
ORDERED = [1.0, 2.0, 0.5]  # keys sorted, as leaves are
PATHS = ["depth", "edges", "labels"]
JAC = matrix("gaussian", 3, 5)
LOSSES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
KEY = jd.random.key(0)

RULES = {
    "upgrad": jd.upgrad,
    "dualproj": jd.dualproj,
    "cagrad": lambda p: jd.cagrad(preference=p),
    "aligned_mtl": jd.aligned_mtl,
    "config": jd.config,
    "config_momentum": lambda p: jd.config_momentum(visit="all", preference=p),
    "epo": jd.epo,
    "pmgda": jd.pmgda,
    "geometric_median": jd.geometric_median,
    "sdmgrad": lambda p: jd.weighted(jd.sdmgrad(preference=p)),
    "constant": jd.constant,
    "graddrop": lambda p: jd.graddrop(
        {k: v / 2 for k, v in p.items()} if hasattr(p, "items") else [v / 2 for v in p]
    ),
    "smoothed": lambda p: jd.smoothed(jd.mgda(), initial_weights=p),
    "smoothed inside": lambda p: jd.smoothed(jd.upgrad(p)),
    "every": lambda p: jd.every(jd.upgrad(p), 2),
    "grouped": lambda p: jd.grouped({"all": jd.upgrad(p)}, jd.together),
    "monitored": lambda p: jd.monitored(jd.upgrad(p), {"weights": jd.measures.weights}),
}
SCALARIZERS = {
    "constant": jd.scalarizers.constant,
    "tchebycheff": jd.scalarizers.tchebycheff,
    "augmented_tchebycheff": jd.scalarizers.augmented_tchebycheff,
    "stch": lambda p: jd.scalarizers.stch(weights=p),
    "cosmos": lambda p: jd.scalarizers.cosmos(p, 1.0),
    "pbi": jd.scalarizers.pbi,
    "p_norm": lambda p: jd.scalarizers.p_norm(weights=p),
    "power_mean": lambda p: jd.scalarizers.power_mean(0.5, weights=p),
}


@pytest.mark.parametrize("name", RULES)
def test_numbers_by_name_are_those_in_leaf_order(name):
    named, plain = RULES[name](NUMBERS), RULES[name](ORDERED)
    for rule in (named, plain):
        assert "Aggregator" in repr(rule)
    got, want = (rule(JAC, rule.init(JAC, key=KEY), losses=LOSSES)[0] for rule in (named, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", RULES)
def test_names_are_those_of_the_losses(name):
    rule = RULES[name](NUMBERS)
    _names.check_names(rule, PATHS)
    _names.check_names(RULES[name](ORDERED), ["loss"])  # without names, nothing to check
    for paths in (["depth", "edges", "words"], ["depth", "edges"], [""]):
        with pytest.raises(ValueError, match=r"`(preference|weights|leak|initial_weights)` must"):
            _names.check_names(rule, paths)


@pytest.mark.parametrize("rule", [jd.upgrad(NUMBERS), jd.scalarizers.constant(NUMBERS)])
@pytest.mark.parametrize("names", [PATHS, ["depth", "edges", "words"], [0, 1, 2], None])
def test_names_are_those_of_the_losses_of_a_step(rule, names):
    def objective(x):
        each = x.square()
        return each if names is None else dict(zip(names, each, strict=True))

    params = LOSSES.clone().requires_grad_()
    steps = [
        lambda: jd.grad(objective, rule)(None, LOSSES),
        lambda: jd.init_state(rule, objective, LOSSES),
        lambda: jd.interop.backward_(objective(params), params, rule),
    ]
    for step in steps:
        if names == PATHS:
            step()
            continue
        rule_ = "be a vector: the losses have no names" if names is None else "name the losses"
        with pytest.raises(ValueError, match=rf"`(preference|weights)` must {rule_}"):
            step()


def test_names_reach_into_losses_that_nest():
    numbers = {"b": {"y": 3.0, "x": 2.0}, "a": 1.0}
    rule = jd.constant(numbers)
    _names.check_names(rule, ["a", "b.x", "b.y"])
    torch.testing.assert_close(rule(torch.eye(3))[0], torch.tensor([1.0, 2.0, 3.0]))


def test_numbers_by_name_may_be_mapped():
    sweep = torch.tensor([[1.0, 2.0, 0.5], [0.1, 0.2, 0.7]], dtype=torch.float64)
    named = dict(zip(PATHS, sweep.T, strict=True))
    got = vmap(lambda p: jd.upgrad(p)(JAC)[0])(named)
    torch.testing.assert_close(got, torch.stack([jd.upgrad(p)(JAC)[0] for p in sweep]))


def test_options_by_name_are_shown_by_name():
    assert "preference={'depth': 1, 'edges': 2, 'labels': 0.5}" in repr(jd.upgrad(NUMBERS))


@pytest.mark.parametrize("name", SCALARIZERS)
def test_scalarizers_take_numbers_by_name(name):
    losses = dict(zip(PATHS, LOSSES, strict=True))
    named, plain = SCALARIZERS[name](NUMBERS), SCALARIZERS[name](ORDERED)
    torch.testing.assert_close(named(losses)[0], plain(losses)[0])
    torch.testing.assert_close(named(LOSSES)[0], plain(losses)[0])
    with pytest.raises(ValueError, match="must name the losses"):
        named({"depth": LOSSES[0], "edges": LOSSES[1], "words": LOSSES[2]})


@pytest.mark.parametrize("numbers", [[1.0, -1.0, 1.0], {"a": 1.0, "b": -1.0, "c": 1.0}])
@pytest.mark.parametrize(
    "name", [n for n in (*RULES, *SCALARIZERS) if n not in ("constant", "smoothed")]
)
def test_a_negative_preference_is_an_error(name, numbers):
    make = RULES.get(name) or SCALARIZERS[name]
    with pytest.raises(ValueError, match=r"`(preference|weights|leak)` must be in"):
        make(numbers)


def test_fixed_weights_may_be_negative():
    jac = torch.eye(2)
    torch.testing.assert_close(jd.constant({"a": -1.0, "b": 2.0})(jac)[0], torch.tensor([-1.0, 2]))


def test_rules_with_names_are_made_in_compiled_code():
    fast, counter = compiled(lambda p: jd.upgrad(p)(JAC)[0])
    for scale in (1.0, 2.0):
        numbers = {name: torch.tensor(scale * x) for name, x in NUMBERS.items()}
        torch.testing.assert_close(fast(numbers), scale * jd.upgrad(ORDERED)(JAC)[0])
    assert counter.graphs == 1
