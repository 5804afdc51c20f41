"""Sharded parameters and states of rules, through `torch.distributed.checkpoint`."""

import functools

import pytest
import torch

import torchjd_func as jd
from tests import registry, workers
from tests.distributed.test_data_parallel import data, objective, parameters, part
from tests.distributed.test_sharded import placed, whole
from tests.helpers import assert_trees_close
from torchjd_func import _tree


def stateful():
    """Return a rule for each kind of state."""
    rules = {
        "memory and key": jd.smoothed(jd.gradvac()),
        "groups": jd.grouped(jd.smoothed(jd.mgda()), jd.by_tensor),
    }
    kinds = {}
    for name, method in registry.METHODS.items():
        if method.min_m <= 3:
            rule = method.make(3)
            state = rule.init(torch.ones(3, 4), key=jd.random.key(0))
            kinds.setdefault(type(state), (name, rule))
    return rules | dict(pair for kind, pair in kinds.items() if kind is not tuple)


RULES = stateful()


def start(rule, params, batch, fn):
    """Return what a training step carries on."""
    return {"params": params, "rule": jd.init_state(rule, fn, params, batch, key=jd.random.key(1))}


def steps(rule, carried, batch, fn, n):
    """Take some steps."""
    step = jd.grad(fn, rule)
    for _ in range(n):
        grads, state = step(carried["rule"], carried["params"], batch)
        moved = _tree.map(lambda p, g: p - 0.01 * g, carried["params"], grads)
        carried = {"params": moved, "rule": state}
    return carried


def to_save(carried):
    """Return the tensors of a checkpoint."""
    return {
        name: one | {"rule": jd.interop.state_dict(RULES[name], one["rule"])}
        for name, one in carried.items()
    }


def fresh(params, batch, fn):
    """Return what training starts with, by each rule."""
    return {name: start(rule, params, batch, fn) for name, rule in RULES.items()}


def restored(read):
    """Return what a training step carries on."""
    return {
        name: one | {"rule": jd.interop.load_state_dict(RULES[name], one["rule"])}
        for name, one in read.items()
    }


def go_on(carried, batch, fn, n):
    """Take some steps by each rule."""
    return {name: steps(rule, carried[name], batch, fn, n) for name, rule in RULES.items()}


def save_after_two_steps(path):
    """Train on two processes, and save."""
    from torch.distributed.checkpoint.state_dict_saver import save

    fn, batch = jd.distributed.sharded(objective(3)), part(data())
    carried = go_on(fresh(placed(parameters(), "rows"), batch, fn), batch, fn, 2)
    save(to_save(carried), checkpoint_id=path)


def load_and_go_on(path, layout):
    """Load with another layout, and take two more steps."""
    from torch.distributed.checkpoint.state_dict_loader import load

    fn, batch = jd.distributed.sharded(objective(3)), part(data())
    empty = fresh(placed(_tree.map(torch.zeros_like, parameters()), layout), batch, fn)
    read = _tree.map(torch.empty_like, to_save(empty))
    load(read, checkpoint_id=path)
    loaded = restored(read)
    for got, want in zip(_tree.leaves(loaded), _tree.leaves(empty), strict=True):
        assert getattr(got, "placements", None) == getattr(want, "placements", None)
    return whole(go_on(loaded, batch, fn, 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a checkpoint of two processes."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    workers.run(2, save_after_two_steps, folder)
    return folder


@functools.cache
def expected():
    """Return what four steps in this process come to."""
    fn = objective(3)
    return go_on(fresh(parameters(), data(), fn), data(), fn, 4)


def assert_equal(found):
    """Check that all is as in one process that never stopped."""
    for name, want in expected().items():
        try:
            assert_trees_close(found[name], want, rtol=1e-10, atol=1e-10)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(("world", "layout"), [(2, "columns"), (4, "replicas")])
def test_other_processes_go_on(saved, world, layout):
    for found in workers.run(world, load_and_go_on, saved, layout):
        assert_equal(found)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_goes_on(saved):
    from torch.distributed.checkpoint.state_dict_loader import load

    fn = objective(3)
    empty = fresh(_tree.map(torch.zeros_like, parameters()), data(), fn)
    read = _tree.map(torch.empty_like, to_save(empty))
    load(read, checkpoint_id=saved, no_dist=True)
    assert_equal(go_on(restored(read), data(), fn, 2))
