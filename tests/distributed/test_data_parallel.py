"""A rule on several ranks gives what it gives in one process on the whole batch."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import registry, scalarizer_registry, workers
from tests.helpers import assert_trees_close, compiled
from tests.short import COLUMNS, SHORT
from torchjd_func import _tree

STEPS = 3


def data():
    """Return the whole batch, which 2 or 4 ranks share."""
    return jd.random.normal(jd.random.key(1), (12, 4), dtype=torch.float64)


def parameters():
    """Return parameters of several shapes, whose number no world size divides."""
    draw = jd.random.normal(jd.random.key(2), (31,), dtype=torch.float64)
    return {"trunk": {"w": draw[:24].reshape(4, 6), "b": draw[24:30]}, "gain": draw[30]}


def objective(m):
    """Return `m` positive losses, means over a batch, that conflict."""
    targets = jd.random.normal(jd.random.key(3), (m, 6), dtype=torch.float64)

    def losses(params, x):
        outputs = params["gain"] * torch.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
        return (outputs.unsqueeze(1) - targets).square().sum(-1).mean(0) + 0.1

    return losses


def part(batch):
    """Return the part of a batch that this rank has."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def train(fn, rule, key, batch, backend=None):
    """Return parameters, state and losses after some steps."""
    params = parameters()
    state = jd.init_state(rule, fn, params, batch, key=key)
    step = jd.grad_and_value(fn, rule)
    if backend is not None:
        step = torch.compile(step, backend=backend, fullgraph=True)
    losses = None
    for _ in range(STEPS):
        grads, losses, state = step(state, params, batch)
        params = _tree.map(lambda p, g: p - 0.01 * g, params, grads)
    return params, state, losses


def methods():
    """Return the objective, the rule and the key of each method."""
    found = {
        name: (objective(max(3, method.min_m)), method.make(max(3, method.min_m)), key_for(method))
        for name, method in registry.METHODS.items()
    }
    apart = jd.grouped({"trunk": jd.gradvac(), "gain": jd.upgrad()}, jd.by_network)
    watched = jd.monitored(
        jd.grouped(jd.upgrad(), jd.by_tensor), {"gap": jd.measures.stationarity_gap}
    )
    random = jd.random.key(5)
    return {
        **found,
        "groups": (objective(3), apart, random),
        "watched groups": (objective(3), watched, None),
        "cheap groups": (objective(3), jd.grouped(jd.imtl_g(), jd.by_network), None),
    }


def scalarizers():
    """Return the objective, the rule and the key of each scalarizer."""
    return {
        name: (objective(3), method.make(3), key_for(method))
        for name, method in scalarizer_registry.METHODS.items()
    }


def key_for(method):
    """Return a key if the method draws random numbers."""
    return jd.random.key(5) if method.random else None


def parallel(cases):
    """Train by each rule on the part of this rank."""
    found = {}
    for name, (fn, rule, key) in cases().items():
        rule = jd.distributed.data_parallel(rule)
        params, state, losses = train(fn, rule, key, part(data()))
        found[name] = params, state, jd.distributed.mean(losses)
    return found


@functools.cache
def alone(cases: Callable[[], dict[str, Any]]):
    """Train by each rule in this process."""
    return {name: train(fn, rule, key, data()) for name, (fn, rule, key) in cases().items()}


def assert_ranks_agree(first, others, wanted):
    """Check by name that the first rank has what is wanted, and the others the same bits."""
    for name, want in wanted.items():
        try:
            assert_trees_close(first[name], want, rtol=1e-10, atol=1e-10)
            for other in others:
                assert_trees_close(other[name], first[name], rtol=0, atol=0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("cases", [methods, scalarizers])
def test_ranks_equal_one_process(cases, world):
    first, *others = workers.run(world, parallel, cases)
    assert_ranks_agree(first, others, alone(cases))


def short(params, x):
    """Return two losses that are quick to trace."""
    return (params["gain"] * x).square().mean(), (params["trunk"]["b"] - x[:, :1]).square().mean()


def graph():
    """Check that one graph of the steps of some rules does what they do eager, for any size."""
    rules = {
        "rows": jd.distributed.data_parallel(SHORT),
        "scalarizer": jd.distributed.data_parallel(jd.scalarizers.mean()),
        "across workers": jd.distributed.across_workers(COLUMNS),
    }
    batch = part(data())
    states = {name: jd.init_state(rule, short, parameters(), batch) for name, rule in rules.items()}
    steps = {name: jd.grad(short, rule) for name, rule in rules.items()}

    def step(states, params, size):
        return {name: run(states[name], params, batch, size=size) for name, run in steps.items()}

    fast, counter = compiled(step)
    for size in (len(batch), len(batch) - 2 * dist.get_rank()):
        args = states, parameters(), torch.tensor(size)
        assert_trees_close(fast(*args), step(*args), rtol=1e-9, atol=1e-9)
    assert counter.graphs == 1


def test_a_compiled_step_equals_an_eager_one():
    workers.run(2, graph)


def heads():
    """Train a shared trunk and two heads."""
    targets = {"a": 0.3, "b": -0.2}

    def trunk(shared, x):
        return torch.tanh(x @ shared["w"])

    def head(target, own, features, x):
        return (features @ own - target).square().mean() + 0.1

    tasks = {name: functools.partial(head, target) for name, target in targets.items()}
    return jd.multitask(trunk, tasks)


def heads_params():
    """Return the shared parameters, and those of the heads."""
    draw = jd.random.normal(jd.random.key(2), (32,), dtype=torch.float64)
    return {"w": draw[:20].reshape(4, 5)}, {"a": draw[20:25], "b": draw[25:30]}


def step_with_heads(parallel):
    """Return the gradients of all parameters, of a plain, an accumulated and a scaled objective."""
    rule = jd.distributed.data_parallel(jd.upgrad()) if parallel else jd.upgrad()
    batch = part(data()) if parallel else data()
    fns = heads(), jd.accumulate(heads(), 3), jd.loss_scale.scaled(heads(), jd.loss_scale.init(8.0))
    return [jd.grad(fn, rule)(None, heads_params(), batch)[0] for fn in fns]


def test_gradients_of_heads_are_averaged():
    want = step_with_heads(False)
    for got in workers.run(2, step_with_heads, True):
        assert_trees_close(got, want, rtol=1e-10, atol=1e-12)


def rows(rank):
    """Return a Jacobian with leaves of several dtypes."""
    key = jd.random.fold_in(jd.random.key(7), rank)
    draw = jd.random.normal(key, (3, 20), dtype=torch.float64)
    pairs = draw[:, 12:18].reshape(3, 3, 2).contiguous()
    return {
        "a": draw[:, :7],
        "b": draw[:, 7:12].reshape(3, 5, 1).float(),
        "c": torch.view_as_complex(pairs),
        "d": draw[:, 18].to(torch.bfloat16),
    }


def direct(name):
    """Give a rule the Jacobian of this rank."""
    rule = jd.distributed.data_parallel(methods()[name][1])
    jac = rows(dist.get_rank())
    before = _tree.map(torch.clone, jac)
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * (1 + dist.get_rank())
    found = rule(jac, rule.init(jac, key=jd.random.key(5)), losses=losses)
    assert_trees_close(jac, before, rtol=0, atol=0)
    return found


@pytest.mark.parametrize("name", ["upgrad", "mean", "trimmed_mean", "gradnorm", "graddrop"])
def test_a_jacobian_of_several_dtypes(name):
    rule = methods()[name][1]
    mean = _tree.mean([rows(0), rows(1)])
    losses = torch.tensor([1.5, 3.0, 4.5], dtype=torch.float64)
    want = rule(mean, rule.init(mean, key=jd.random.key(5)), losses=losses)
    for got in workers.run(2, direct, name):
        assert_trees_close(got, want, rtol=1e-2, atol=1e-2)
        exact = [(tree[0]["a"], tree[0]["c"]) for tree in (got, want)]
        assert_trees_close(*exact, rtol=1e-6, atol=1e-6)


def test_a_state_goes_on_in_one_process():
    params, state, _ = workers.run(2, parallel, methods)[0]["smoothed[upgrad]"]
    fn, rule, _ = methods()["smoothed[upgrad]"]
    got = jd.grad(fn, rule)(state, params, data())
    params, state, _ = alone(methods)["smoothed[upgrad]"]
    assert_trees_close(got, jd.grad(fn, rule)(state, params, data()), rtol=1e-9, atol=1e-10)


def test_a_weighting_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"is not the mean of the processes' Gramians.*jd\.weighted"
    ):
        jd.distributed.data_parallel(jd.upgrad().weighting)  # pyright: ignore


@pytest.mark.parametrize("make", [jd.distributed.data_parallel, jd.distributed.across_workers])
def test_a_distributed_rule_is_wrapped_last(make):
    rule = make(jd.upgrad())
    for wrap in (
        make,
        jd.smoothed,
        lambda rule: jd.grouped(rule, jd.by_layer),
        lambda rule: jd.monitored(rule, {}),
        lambda rule: jd.grad(objective(3), rule, where=lambda path: True),
    ):
        with pytest.raises(ValueError, match="wrap it last"):
            wrap(rule)


def test_no_rule():
    with pytest.raises(TypeError, match="data_parallel"):
        jd.distributed.data_parallel(3)  # pyright: ignore
    with pytest.raises(TypeError, match="across_workers"):
        jd.distributed.across_workers(jd.scalarizers.mean())  # pyright: ignore


def test_outside_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        jd.distributed.data_parallel(jd.upgrad())(torch.eye(2))
