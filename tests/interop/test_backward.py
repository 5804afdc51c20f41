"""`backward_` gives what `jd.grad` gives, for every rule, and touches nothing else."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests import scalarizer_registry
from tests.helpers import assert_trees_close
from tests.interop.models import LR, M, X, descend, grads_of, losses_of, network, tasks
from tests.registry import METHODS, key_for
from torchjd_func import _tree


def make_rules() -> Any:
    """Return each rule's factory, and its key."""
    found: Any = {name: (method.make, key_for(method)) for name, method in METHODS.items()}
    for name, method in scalarizer_registry.METHODS.items():
        found["scalarizers." + name] = method.make, scalarizer_registry.key_for(method)
    return found


RULES = make_rules()


@pytest.mark.parametrize("chunk_size", [1, None])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_numbers_of_the_functional_way(name, chunk_size):
    make, key = RULES[name]
    model, rule = network(), make(M)
    apply, params, buffers = jd.functionalize(copy.deepcopy(model))

    def objective(params):
        return losses_of(apply(params, buffers, X)[0])

    want = jd.init_state(rule, objective, params, key=key)
    state = None
    for _ in range(3):
        grads, want = jd.grad(objective, rule)(want, params)
        losses = losses_of(model(X))
        state = jd.interop.backward_(losses, model, rule, state, key=key, chunk_size=chunk_size)
        assert_trees_close(grads_of(model), grads, rtol=1e-12, atol=1e-12)
        assert_trees_close(state, want, rtol=1e-12, atol=1e-12)
        assert not any(leaf.requires_grad for leaf in _tree.leaves(state))
        params = _tree.map(lambda p, g: p - LR * g, params, grads)
        descend(model.parameters())


def test_directions_are_added_as_by_backward():
    model, twin = network(), network()
    for _ in range(2):
        jd.interop.backward_(losses_of(model(X)), model, jd.sum())
        losses = losses_of(twin(X))
        (losses["a"] + losses["b"].sum()).backward()
    assert_trees_close(grads_of(model), grads_of(twin), rtol=1e-12)


@pytest.mark.parametrize("rule", [jd.upgrad(), jd.mean(), jd.scalarizers.mean()], ids=repr)
def test_what_is_not_reached_or_not_trained_is_left_alone(rule):
    model, other = network(), nn.Linear(2, 2)
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    jd.interop.backward_(losses_of(model(X)), [model, other], rule)
    assert all(param.grad is None for param in other.parameters())
    assert model[0].weight.grad.eq(7).all()
    assert model[0].bias.grad is not None


def test_targets_of_all_kinds_give_the_same():
    model = network()
    targets = {
        "module": model,
        "parameters": model.parameters(),
        "dict": dict(model.named_parameters()),
        "modules": [model[0], {"last": model[2]}],
        "twice": (model, list(model.parameters())),
    }
    jd.interop.backward_(losses_of(model(X)), model, jd.upgrad())
    want = {name: grad.clone() for name, grad in grads_of(model).items()}
    for target in targets.values():
        model.zero_grad()
        jd.interop.backward_(losses_of(model(X)), target, jd.upgrad())
        assert_trees_close(grads_of(model), want, rtol=1e-12)


def test_part_of_a_model_can_be_the_target():
    model = network()
    with pytest.warns(UserWarning, match=LEFT_OUT.format(r"\(6, 4\), \(6,\)")):
        jd.interop.backward_(losses_of(model(X)), model[2], jd.upgrad())
    assert model[0].weight.grad is None
    frozen = {f"2.{name}": param.detach() for name, param in model[2].named_parameters()}
    apply, params, buffers = jd.functionalize(model)
    want, _ = jd.grad(lambda p: losses_of(apply(params | p, buffers, X)[0]), jd.upgrad())(
        None, frozen
    )
    assert_trees_close({"2." + n: g for n, g in grads_of(model[2]).items()}, want, rtol=1e-12)


LEFT_OUT = r"not in `target`, of shapes \[{}\], so this call does not train them"


@pytest.mark.parametrize("rule", [jd.upgrad(), jd.mean(), jd.config(), jd.scalarizers.mean()])
@pytest.mark.parametrize("with_features", [False, True])
def test_heads_that_are_no_target_are_named(rule, with_features):
    model = tasks()
    z, losses = model.losses(X, ("a", "b"))
    options = {"features": z} if with_features else {}
    with pytest.warns(UserWarning, match=LEFT_OUT.format(r"(\(1, 3\), \(1,\)(, )?){2}")) as caught:
        jd.interop.backward_(losses, model.trunk, rule, **options)
    assert len(caught) == 1
    assert model.heads["a"].weight.grad is None


def test_what_is_trained_by_another_pass_or_no_parameter_is_not_named():
    model, x = tasks(), X.clone().requires_grad_()
    _, losses = model.losses(x)
    jd.interop.backward_(losses, model.trunk, jd.upgrad(), retain_graph=True)
    model.trunk.requires_grad_(False)
    _, losses = model.losses(x)
    jd.interop.backward_(losses, model.heads, jd.mean())
    assert x.grad is None


def test_groups_are_found_by_the_names_of_parameters():
    model, rule = network(), jd.grouped({"0": jd.upgrad(), "2": jd.mgda()}, jd.by_network)
    apply, params, buffers = jd.functionalize(model)
    want, _ = jd.grad(lambda p: losses_of(apply(p, buffers, X)[0]), rule)(None, params)
    jd.interop.backward_(losses_of(model(X)), model, rule)
    assert_trees_close(grads_of(model), want, rtol=1e-12)


def test_the_graph_is_kept_where_it_is_asked_for():
    model = network()
    losses = losses_of(model(X))
    jd.interop.backward_(losses, model, jd.upgrad(), retain_graph=True)
    jd.interop.backward_(losses, model, jd.upgrad())
    with pytest.raises(RuntimeError, match="second time"):
        jd.interop.backward_(losses, model, jd.upgrad())


def test_gradients_share_no_memory_with_the_state_or_with_each_other():
    w: Any = torch.zeros(3, requires_grad=True)
    rule = jd.moco()
    state = jd.interop.backward_([w.sum(), 2 * w.sum()], w, rule)
    saved = _tree.map(torch.clone, state)
    w.grad.mul_(100)
    assert_trees_close(state, saved, rtol=0, atol=0)


def test_a_past_graph_is_not_kept_by_the_state():
    model, rule = network(), jd.smoothed(jd.upgrad())
    state = rule.init(torch.ones(M, 2, dtype=torch.float64))
    state = state._replace(weights=state.weights.clone().requires_grad_() * 2)
    state = jd.interop.backward_(losses_of(model(X)), model, rule, state)
    assert not state.weights.requires_grad


@pytest.mark.parametrize("make", [jd.upgrad, lambda: jd.smoothed(jd.mgda()), jd.mean])
def test_weights_may_come_from_some_parameters(make):
    model, rule = network(), make()
    apply, params, buffers = jd.functionalize(copy.deepcopy(model))

    def objective(params):
        return losses_of(apply(params, buffers, X)[0])

    def last(path):
        return path.startswith("2.")

    want, state = jd.init_state(rule, objective, params), None
    for _ in range(2):
        grads, want = jd.grad(objective, rule, where=last)(want, params)
        state = jd.interop.backward_(losses_of(model(X)), model, rule, state, where=last)
        assert_trees_close(grads_of(model), grads, rtol=1e-12)
        assert_trees_close(state, want, rtol=1e-12)
        model.zero_grad()
