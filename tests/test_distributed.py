"""A rule on several ranks gives what it gives in one process on the whole batch."""

import functools

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import registry, scalarizer_registry, workers
from tests.helpers import assert_trees_close

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
        params = jd._tree.map(lambda p, g: p - 0.01 * g, params, grads)
    return params, state, losses


def methods():
    """Return the objective, the rule and the key of each method."""
    return {
        name: (objective(max(3, method.min_m)), method.make(max(3, method.min_m)), key_for(method))
        for name, method in registry.METHODS.items()
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
def alone(cases):
    """Train by each rule in this process."""
    return {name: train(*case, data()) for name, case in cases().items()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("cases", [methods, scalarizers])
def test_ranks_equal_one_process(cases, world):
    first, *others = workers.run(world, parallel, cases)
    for name, want in alone(cases).items():
        try:
            assert_trees_close(first[name], want, rtol=1e-10, atol=1e-10)
            for other in others:
                assert_trees_close(other[name], first[name], rtol=0, atol=0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
