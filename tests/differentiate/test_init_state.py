"""The state of a rule for an objective that may read values, and what is left as it was."""

import functools
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.differentiate.objectives import (
    MULTITASK,
    MULTITASK_PARAMS,
    OBJECTIVES,
    PARAMS,
    ROUTES,
    X,
    outputs,
)
from tests.helpers import assert_trees_close
from torchjd_func import _tree


def item(params, x):
    return outputs(params, x).mean(0) * float(x.max().item())


def branch(params, x):
    return outputs(params, x).mean(0) if x.max() > 0 else params["last"].sum(1)


def selection(params, x):
    out = outputs(params, x)
    return torch.stack([out[x[:, 0] > 0].mean(), out[x[:, 0] <= 0].mean()])


def categorical(params, x):
    chosen = torch.distributions.Categorical(logits=outputs(params, x)).log_prob(
        (x[:, 0] > 0).long()
    )
    return {"policy": chosen.mean(), "value": outputs(params, x).square().mean()}


READS = {fn.__name__: fn for fn in (item, branch, selection, categorical)}


@pytest.mark.parametrize("fn", READS.values(), ids=READS)
@pytest.mark.parametrize("rule", [jd.smoothed(jd.upgrad()), jd.scalarizers.dwa()], ids=repr)
def test_of_objectives_that_read_values(fn, rule):
    state = jd.init_state(rule, fn, PARAMS, X)
    _, _, after = jd.grad_and_value(fn, rule)(state, PARAMS, X)
    assert _tree.same_structure(state, after)
    assert_trees_close(jd.grad(fn, rule)(state, PARAMS, X), jd.grad(fn, rule)(None, PARAMS, X))


@pytest.mark.parametrize("fn", OBJECTIVES.values(), ids=OBJECTIVES)
def test_of_every_objective(fn):
    rule = jd.smoothed(jd.upgrad())
    state = jd.init_state(rule, fn, PARAMS, X, route="auto")
    want = rule.init(jd.jac(fn)(PARAMS, X))
    assert_trees_close(state, want)
    by_rows = jd.moco()
    assert_trees_close(jd.init_state(by_rows, fn, PARAMS, X), by_rows.init(jd.jac(fn)(PARAMS, X)))


def test_of_heads_with_several_losses():
    rule = jd.smoothed(jd.upgrad())
    state = jd.init_state(rule, MULTITASK, MULTITASK_PARAMS, X)
    assert_trees_close(state, rule.init(jd.jac(MULTITASK)(MULTITASK_PARAMS, X)))


def test_keyword_arguments_are_bound_before():
    def losses(params, x, *, power):
        return outputs(params, x).mean(0) ** power

    rule = jd.smoothed(jd.upgrad())
    state = jd.init_state(rule, functools.partial(losses, power=2), PARAMS, X)
    after = jd.grad(losses, rule)(state, PARAMS, X, power=2)[1]
    assert _tree.same_structure(state, after)


class Rotary(nn.Module):
    """A layer that makes its table at the first call, and counts calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.table = None
        self.tables = {}
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cosine", None, persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype).cos()
            self.tables[x.shape[-1]] = self.table
            self.cosine = self.table
        self.calls += 1
        return self.linear(nn.functional.dropout(x, 0.5) * self.table)


@pytest.mark.parametrize("reads", [False, True])
def test_modules_and_generators_are_left_as_they_were(reads):
    model, direct = Rotary(), Rotary()
    apply, params, buffers = jd.functionalize(model)
    generator = torch.Generator().manual_seed(0)
    numpys, pythons = np.random.default_rng(0), random.Random(0)

    def losses(params, x):
        if reads and x.max() < -1e9:
            raise AssertionError
        noise = torch.randn(x.shape, generator=generator)
        noise = noise + random.random() + np.random.rand() + numpys.random() + pythons.random()
        return apply(params, buffers, x + noise)[0].mean(0) + direct(x).mean().detach()

    def states():
        found = random.getstate(), np.random.get_state(), numpys.bit_generator.state
        return pickle.dumps((*found, pythons.getstate()))

    before = torch.get_rng_state(), generator.get_state()
    others = states()
    jd.init_state(jd.upgrad(), losses, params, torch.randn(4, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert states() == others
    for module in (model, direct):
        assert module.table is None
        assert module.tables == {}
        assert module.cosine is None
        assert int(module.calls) == 0
        assert all(type(leaf) is nn.Parameter for leaf in module.parameters())


def test_errors_of_the_objective_are_its_own():
    def losses(params, x):
        raise KeyError("a name that is missing")

    with pytest.raises(KeyError, match="a name that is missing"):
        jd.init_state(jd.upgrad(), losses, PARAMS, X)


@pytest.mark.parametrize("route", ROUTES)
def test_the_route_changes_no_state(route):
    rule = jd.smoothed(jd.upgrad())
    state = jd.init_state(rule, OBJECTIVES["tree"], PARAMS, X, route=route)
    assert_trees_close(state, jd.init_state(rule, OBJECTIVES["tree"], PARAMS, X))


def partly_constant(params, x):
    hidden = x @ params["w"]
    return {"a": hidden.square().mean(), "b": hidden.detach().abs().mean()}


READING = [False, True]  # whether the objective reads values, and so runs for real


@pytest.mark.parametrize("reads", READING)
def test_warns_of_losses_that_nothing_trains(reads):
    def losses(params, x):
        if reads and x.max() < -1e9:
            raise AssertionError
        return partly_constant(params, x)

    with pytest.warns(UserWarning, match=r"Losses \['b'\] are constants"):
        jd.init_state(jd.mgda(), losses, {"w": torch.ones(3)}, torch.ones(4, 3))


@pytest.mark.parametrize("reads", READING)
@pytest.mark.parametrize("wrap", [lambda fn: fn, jd.instancewise, lambda fn: jd.accumulate(fn, 2)])
def test_refuses_losses_that_are_constants(reads, wrap):
    model = nn.Linear(3, 4)

    def losses(params, x):
        if reads and x.max() < -1e9:
            raise AssertionError
        return model(x).square().mean(1)

    with pytest.raises(ValueError, match="depend on the differentiated argument"):
        jd.init_state(jd.mgda(), wrap(losses), dict(model.named_parameters()), torch.ones(4, 3))


def test_inside_other_transforms():
    def weights(w):
        return jd.init_state(jd.gradnorm(), lambda w: w.square(), w).weights

    assert torch.func.vmap(weights)(torch.ones(2, 3)).shape == (2, 3)
    assert torch.func.grad(lambda w: (weights(w) * w).sum())(torch.ones(3)).tolist() == [1, 1, 1]
