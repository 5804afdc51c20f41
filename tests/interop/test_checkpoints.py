"""States of rules through files, and states in the hands of other rules."""

import io
import itertools
from typing import Any, NamedTuple

import pytest
import torch

import torchjd_func as jd
from tests import scalarizer_registry
from tests.helpers import assert_same_layout, assert_trees_close, clone
from tests.registry import METHODS, fresh, key_for
from torchjd_func import _tree

M = 5
ROWS = torch.randn(M, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LOSSES = torch.linspace(1, 2, M, dtype=torch.float64)
PARAMS = {"w": torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses_of(params, x):
    return (x @ params["w"]).sin().square().mean(0)


def aggregate(rule, state, device="cpu"):
    return rule(ROWS.to(device), state, losses=LOSSES.to(device))


def scalarize(rule, state, device="cpu"):
    return rule(LOSSES.to(device), state)


def fresh_rule(name, device="cpu") -> Any:
    """Return a rule, a state of it, and how it is called."""
    if name in METHODS:
        return (*fresh(METHODS[name], ROWS.to(device), M), aggregate)
    method = scalarizer_registry.METHODS[name.removeprefix("scalarizers.")]
    return (*scalarizer_registry.fresh(method, LOSSES.to(device), M), scalarize)


NAMES = [*METHODS, *(f"scalarizers.{name}" for name in scalarizer_registry.METHODS)]
RULES = {name: fresh_rule(name) for name in NAMES}
WITH_MEMORY = [name for name, (_, state, _) in RULES.items() if _tree.leaves(state)]


def through_a_file(saved):
    """Save and load as an untrusted file is loaded."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", RULES)
def test_the_state_of_every_rule_goes_through_a_file(name, device):
    rule, state, call = fresh_rule(name, device)
    _, state = call(rule, state, device)
    before = clone(state)
    saved = through_a_file(jd.interop.state_dict(rule, state))
    assert all(isinstance(tensor, torch.Tensor) for tensor in saved.values())
    loaded = jd.interop.load_state_dict(rule, saved)
    assert_same_layout(loaded, state)
    assert_trees_close(loaded, before, rtol=0, atol=0)
    assert type(loaded) is type(state)
    again = [call(rule, kept, device) for kept in (loaded, state)]
    assert_trees_close(*again, rtol=0, atol=0)


def test_no_rule_loads_the_state_of_another_method():
    saved = {name: jd.interop.state_dict(rule, state) for name, (rule, state, _) in RULES.items()}
    refused = 0
    for (name, (rule, state, _)), other in itertools.product(RULES.items(), RULES):
        theirs, of_theirs, _ = RULES[other]
        if theirs.name == rule.name and type(of_theirs) is type(state):
            loaded = jd.interop.load_state_dict(rule, saved[other])
            assert type(loaded) is type(state), (name, other)
            continue
        with pytest.raises(ValueError, match=r"`saved` must be a state of|`state` of") as caught:
            jd.interop.load_state_dict(rule, saved[other])
        if theirs.name != rule.name:
            assert f"`{rule.name}`, got one of `{theirs.name}`" in str(caught.value)
        refused += 1
    assert refused > 12_000


def test_no_rule_takes_the_state_of_another_method():
    for (name, (rule, state, call)), other in itertools.product(RULES.items(), RULES):
        theirs, of_theirs, _ = RULES[other]
        if theirs.name == rule.name or _tree.same_structure(state, of_theirs):
            continue  # without tensors it is nobody's
        with pytest.raises(ValueError, match="`state"):
            call(rule, of_theirs)
            pytest.fail(f"{name} took a state of {other}")


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_the_state_of_another_size_is_refused_where_it_has_a_size(name):
    rule, state, call = RULES[name]
    method = METHODS.get(name)
    if method is None:
        method = scalarizer_registry.METHODS[name.removeprefix("scalarizers.")]
        key = scalarizer_registry.key_for(method)
        other = method.make(M + 1).init(torch.ones(M + 1, dtype=torch.float64), key=key)
    else:
        other = method.make(M + 1).init(ROWS[[0, *range(M)]], key=key_for(method))
    if [x.shape for x in _tree.leaves(other)] == [x.shape for x in _tree.leaves(state)]:
        call(rule, other)
        return
    with pytest.raises(ValueError, match="`state"):
        call(rule, other)


def test_a_nested_state_of_another_method_is_refused_compiled_too():
    outer, theirs = jd.smoothed(jd.nash_mtl()), jd.smoothed(jd.gradvac())
    state = theirs.init(ROWS, key=jd.random.key(0))
    with pytest.raises(ValueError, match="`nash_mtl` must be a NashMTLState, got GradVacState"):
        outer(ROWS, state)
    fast = torch.compile(outer, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="NashMTLState"):
        fast(ROWS, state)


def test_names_are_those_of_fields_and_keys():
    rule = jd.smoothed(jd.monitored(jd.gradvac(), {"weights": jd.measures.weights}))
    names = set(jd.interop.state_dict(rule, rule.init(ROWS, key=jd.random.key(0))))
    want = {"weights", "step", "inner.measures.weights", "inner.inner.phi", "inner.inner.key"}
    assert want <= names
    assert names - want == {"inner.inner.step", "torchjd_func"} & names
    assert set(jd.interop.state_dict(jd.upgrad(), ())) == {"torchjd_func"}


def test_training_goes_on_where_it_was_saved(device):
    rule = jd.smoothed(jd.mgda())
    step, x = jd.grad(losses_of, rule), X.to(device)
    start = {"w": PARAMS["w"].to(device)}

    def train(params, state, n):
        for _ in range(n):
            grads, state = step(state, params, x)
            params = _tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, state

    initial = jd.init_state(rule, losses_of, start, x)
    whole = train(start, initial, 6)
    params, state = train(start, initial, 3)
    saved = through_a_file({"params": params, "rule": jd.interop.state_dict(rule, state)})
    state = jd.interop.load_state_dict(rule, saved["rule"])
    assert_trees_close(train(saved["params"], state, 3), whole, rtol=0, atol=0)


RULE = jd.smoothed(jd.gradvac())
SAVED = jd.interop.state_dict(RULE, RULE.init(ROWS, key=jd.random.key(0)))


def changed(old, new):
    """Return the saved state with another text."""
    text = bytes(SAVED["torchjd_func"].tolist()).decode()
    assert old in text
    return SAVED | {"torchjd_func": torch.tensor(list(text.replace(old, new).encode()))}


BAD = {
    "missing": ({k: v for k, v in SAVED.items() if k != "step"}, r"missing \['step'\]"),
    "unexpected": (SAVED | {"c": X}, r"saved.*unknown \['c'\]"),
    "of another shape": (SAVED | {"weights": torch.ones(3).double()}, r"\(5,\) .* at 'weights'"),
    "of another dtype": (SAVED | {"weights": torch.ones(5)}, "dtype torch.float64 at 'weights'"),
    "of another format": (changed('"format": 1', '"format": 2'), "format 1, got format 2"),
    "of another kind": (changed("GradVacState", "Popen"), "named tuples of the rule.*a Popen"),
    "with other fields": (changed('["step", {', '["count", {'), "named tuples of the rule"),
    "of something else": ({"weights": X}, "be made by jd.interop.state_dict"),
    "not a text": (SAVED | {"torchjd_func": X}, "be made by jd.interop.state_dict"),
    "nothing": ({}, "be made by jd.interop.state_dict"),
}


@pytest.mark.parametrize(("saved", "message"), BAD.values(), ids=BAD)
def test_a_dict_that_does_not_fit_is_refused_by_name(saved, message):
    with pytest.raises(ValueError, match=message):
        jd.interop.load_state_dict(RULE, saved)


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(TypeError, match="`rule` must be a rule, got a tensor"):
        jd.interop.state_dict(X, ())
    with pytest.raises(ValueError, match="`state` of `gradvac` must be a GradVacState, got tuple"):
        jd.interop.state_dict(jd.gradvac(), ())
    state = jd.moco().init({"a.b": ROWS, "a": {"b": ROWS}})
    with pytest.raises(ValueError, match=r"one leaf of each name, got \['[a-z_.]*a.b'\] twice"):
        jd.interop.state_dict(jd.moco(), state)
    own = jd.Aggregator("own", lambda jac, key: 3, lambda jac, state, losses: (jac, state))
    with pytest.raises(TypeError, match=r"tensors only, in named tuples.* got int"):
        jd.interop.state_dict(own, 3)


class Seen(NamedTuple):
    """The state of a rule of a user."""

    total: torch.Tensor


def start(statistic, key):
    return Seen(statistic.new_zeros(()))


def add_up(statistic, state, losses):
    return torch.ones_like(statistic[0]), Seen(state.total + statistic.trace())


def test_states_of_users_rules_and_of_sets_are_saved_too():
    def local(statistic, key):
        return start(statistic, key)

    mine = jd.Weighting("mine", local, add_up)
    for rule in (
        jd.weighted(mine),
        jd.smoothed(jd.weighted(mine)),
        jd.grouped(jd.weighted(mine), jd.together),
    ):
        _, state = rule(ROWS)
        loaded = jd.interop.load_state_dict(rule, jd.interop.state_dict(rule, state))
        assert_trees_close(rule(ROWS, loaded), rule(ROWS, state), rtol=0, atol=0)
    rule = jd.sets.pareto_mtl(torch.eye(2, dtype=torch.float64))
    state = rule.init(torch.ones(2, 2, 3))
    loaded = jd.interop.load_state_dict(rule, jd.interop.state_dict(rule, state))
    assert_trees_close(loaded, state)


def test_structures_of_parameters_come_back():
    rows = torch.ones(2, 3)
    for jac in ({"b": [rows], "a": (rows, None)}, (rows, {0: rows, 1: rows}), [rows]):
        state = jd.moco().init(jac)
        loaded = jd.interop.load_state_dict(jd.moco(), jd.interop.state_dict(jd.moco(), state))
        assert_same_layout(loaded, state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_says_what_to_read(tmp_path):
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    rule = jd.grouped(jd.smoothed(jd.gradvac()), jd.by_tensor)
    _, state = rule({"a": ROWS, "b": ROWS}, rule.init({"a": ROWS, "b": ROWS}, key=jd.random.key(0)))
    save(jd.interop.state_dict(rule, state), checkpoint_id=tmp_path, no_dist=True)
    known: Any = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    read = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in known.items()}
    load(read, checkpoint_id=tmp_path, no_dist=True)
    assert_trees_close(jd.interop.load_state_dict(rule, read), state, rtol=0, atol=0)
