"""Sharded parameters and states of rules, through `torch.distributed.checkpoint`."""

import pytest
import torch

import torchjd_func as jd
from tests import workers
from tests.distributed.test_data_parallel import data, objective, parameters, part
from tests.distributed.test_sharded import placed, whole
from tests.helpers import assert_trees_close
from torchjd_func import _tree

RULES = {
    "memory and key": lambda: jd.smoothed(jd.gradvac()),
    "groups": lambda: jd.grouped(jd.smoothed(jd.mgda()), jd.by_tensor),
    "rows": lambda: jd.moco(),
}


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


def to_save(rule, carried):
    """Return the tensors of a checkpoint."""
    return carried | {"rule": jd.interop.state_dict(rule, carried["rule"])}


def targets(rule, fresh):
    """Return tensors for a checkpoint to be read into."""
    return _tree.map(torch.empty_like, to_save(rule, fresh))


def restored(rule, read):
    """Return what a training step carries on."""
    return read | {"rule": jd.interop.load_state_dict(rule, read["rule"])}


def save_and_go_on(path):
    """Save after two steps, load with another layout, and take two more."""

    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    found, fn, batch = {}, jd.distributed.sharded(objective(3)), part(data())
    for name, make in RULES.items():
        rule, where = make(), f"{path}/{name}"
        carried = steps(rule, start(rule, placed(parameters(), "rows"), batch, fn), batch, fn, 2)
        save(to_save(rule, carried), checkpoint_id=where)
        fresh = start(rule, placed(_tree.map(torch.zeros_like, parameters()), "columns"), batch, fn)
        read = targets(rule, fresh)
        load(read, checkpoint_id=where)
        loaded = restored(rule, read)
        for got, want in zip(_tree.leaves(loaded), _tree.leaves(fresh), strict=True):
            assert getattr(got, "placements", None) == getattr(want, "placements", None)
        found[name] = whole(steps(rule, loaded, batch, fn, 2))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder of checkpoints of two ranks, and how these went on."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return folder, workers.run(2, save_and_go_on, folder)


def test_ranks_go_on_with_another_layout(saved):
    for name, make in RULES.items():
        fn, rule = objective(3), make()
        want = steps(rule, start(rule, parameters(), data(), fn), data(), fn, 4)
        for found in saved[1]:
            assert_trees_close(found[name], want, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_goes_on_where_ranks_stopped(saved):
    from torch.distributed.checkpoint.state_dict_loader import load

    for name, make in RULES.items():
        fn, rule = objective(3), make()
        fresh = start(rule, _tree.map(torch.zeros_like, parameters()), data(), fn)
        read = targets(rule, fresh)
        load(read, checkpoint_id=f"{saved[0]}/{name}", no_dist=True)
        loaded = restored(rule, read)
        want = steps(rule, start(rule, parameters(), data(), fn), data(), fn, 4)
        assert_trees_close(steps(rule, loaded, data(), fn, 2), want, rtol=1e-10, atol=1e-10)
