"""Parts of different size, none among them, equal one process with the whole batch."""

import functools

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import workers
from tests.distributed.test_data_parallel import data, objective, parameters
from tests.distributed.test_gathered import squares
from tests.distributed.test_sharded import placed, whole
from tests.helpers import assert_trees_close
from torchjd_func import _tree

SIZES = {2: (7, 5), 4: (5, 4, 0, 3)}
RULES = {
    "gramian": jd.smoothed(jd.upgrad()),
    "size": jd.mean(),
    "columns": jd.trimmed_mean(1),
    "rows": jd.db_mtl(),
    "groups": jd.grouped(jd.mgda(), jd.by_tensor),
    "watched": jd.monitored(jd.upgrad(), {"gap": jd.measures.stationarity_gap}),
}
SCALARIZERS = {"uw": jd.scalarizers.uw(), "famo": jd.scalarizers.famo()}


def own(batch):
    """Return the part of a batch that this process has."""
    return batch.split(SIZES[dist.get_world_size()])[dist.get_rank()]


def train(fn, rule, batch, params, **options):
    """Return parameters, state and losses after two steps."""
    state, losses = jd.init_state(rule, fn, params, batch, key=jd.random.key(5)), None
    step = jd.grad_and_value(fn, rule)
    for _ in range(2):
        grads, losses, state = step(state, params, batch, **options)
        params = _tree.map(lambda p, g: p - 0.01 * g, params, grads)
    return params, state, losses


def objectives():
    """Return objectives of the whole parameters."""
    return {"plain": objective(3), "accumulated": jd.accumulate(objective(3), 1)}


def parallel():
    """Train by each rule on the part of this process."""
    x = own(data())
    got = {}
    for kind, fn in objectives().items():
        for name, rule in {**RULES, **SCALARIZERS}.items():
            spread = jd.distributed.data_parallel(rule)
            params, state, losses = train(fn, spread, x, parameters(), size=len(x))
            losses = jd.distributed.mean(losses, size=len(x))
            got[kind, name] = params, state, losses
    return got


def shards(layout):
    """Train by each rule on the part of this process, with sharded parameters."""
    x, got = own(data()), {}
    for kind, fn in objectives().items():
        fn = jd.accumulate(jd.distributed.sharded(fn.fn.fn), 1) if kind == "accumulated" else fn
        fn = jd.distributed.sharded(fn) if kind == "plain" else fn
        for name, rule in {**RULES, **SCALARIZERS}.items():
            params = placed(parameters(), layout)
            got[kind, name] = whole(train(fn, rule, x, params, size=len(x)))
    return got


@functools.cache
def alone():
    """Train by each rule in this process."""
    return {
        (kind, name): train(fn, rule, data(), parameters())
        for kind, fn in objectives().items()
        for name, rule in {**RULES, **SCALARIZERS}.items()
    }


def assert_equal(got, want):
    """Check by name that all is the same but for rounding."""
    for name, value in want.items():
        try:
            assert_trees_close(got[name], value, rtol=1e-11, atol=1e-12)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("world", SIZES)
def test_rules_weigh_parts_by_size(world):
    first, *others = workers.run(world, parallel)
    assert_equal(first, alone())
    for other in others:
        assert_trees_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize(("world", "layout"), [(2, "rows"), (4, "replicas")])
def test_sharded_objectives_weigh_parts_by_size(world, layout):
    for got in workers.run(world, shards, layout):
        assert_equal(got, alone())


# By process; the third has no example, and the last loss is nowhere else.
HERE = torch.tensor(
    [[True, False, False], [True, True, False], [True, True, True], [False, True, False]]
)
ABSENT = {
    "gramian": jd.smoothed(jd.upgrad()),
    "size": jd.mean(),
    "rows": jd.db_mtl(),
    "uw": jd.scalarizers.uw(),
}


def absent():
    """Step with a size and with losses that only some processes have; then without examples."""
    rank, got = dist.get_rank(), {}
    x, present, fn = own(data()), HERE[rank], objective(3)
    fns = {
        "parallel": (fn, jd.distributed.data_parallel, parameters()),
        "sharded": (jd.distributed.sharded(fn), lambda rule: rule, placed(parameters(), "rows")),
    }
    for kind, (spread, wrap, params) in fns.items():
        for name, rule in ABSENT.items():
            step = jd.grad(spread, wrap(rule))
            options = {"present": present, "size": len(x)}
            got[kind, name] = whole(step(None, params, x, **options))
            _, state = got[kind, name]
            got[kind, name, "none"] = whole(step(state, params, x, size=0))
    return got


def test_losses_that_some_processes_have_are_weighed_by_size():
    sizes = torch.tensor(SIZES[4])
    weights = HERE.double() * sizes.unsqueeze(1)
    weights = weights / weights.sum(0).clamp(min=1)
    parts = [(x, w) for x, w in zip(data().split(SIZES[4]), weights, strict=True) if len(x)]

    def fn(params):
        return sum(objective(3)(params, x) * w for x, w in parts)

    first, *others = workers.run(4, absent)
    for name, rule in ABSENT.items():
        grads, state = jd.grad(fn, rule)(None, parameters(), present=weights.sum(0) > 0)
        nothing = _tree.map(torch.zeros_like, grads), state
        for kind in ("parallel", "sharded"):
            for got in (first, *others):
                assert_equal(got, {(kind, name): (grads, state), (kind, name, "none"): nothing})


def examples():
    """Return parameters and a batch of an objective of examples."""
    draws = jd.random.normal(jd.random.key(0), (80,), dtype=torch.float64)
    params = {"w": draws[:12].reshape(4, 3), "v": draws[12:15], "b": draws[15]}
    return params, (draws[20:68].reshape(12, 4), draws[68:80])


def pipeline(fn, params, x, y, present, **options):
    """Return what transforms make of an objective of examples."""
    first, second = (x, y), (x.flip(1), y)
    smoothed = jd.smoothed(jd.mgda())
    state = jd.init_state(smoothed, fn, params, x, y)
    return {
        "upgrad": jd.grad_and_value(fn, jd.upgrad())(None, params, x, y, **options),
        "state": jd.grad(fn, smoothed)(state, params, x, y, **options),
        "grouped": jd.grad(fn, jd.grouped(jd.mgda(), jd.by_tensor))(None, params, x, y, **options),
        "mean": jd.grad(fn, jd.mean())(None, params, x, y, **options),
        "scalarizer": jd.grad(fn, jd.scalarizers.log_sum())(None, params, x, y, **options),
        "where": jd.grad(fn, jd.upgrad(), where=lambda path: path == "w")(
            None, params, x, y, **options
        ),
        "gramian": jd.gramian_and_value(fn)(params, x, y, **options),
        "norms": jd.row_norms(fn)(params, x, y, **options),
        "two": jd.double_sampling(fn, jd.modo())(None, params, first, second, **options),
        "keyword": jd.gramian(fn)(params, x, y=y, **options),
        "present": jd.grad(fn, jd.mgda())(None, params, x, y, present=present, **options),
    }


def examples_here(kinds, layout):
    """Run on the part of this process."""
    params, batch = examples()
    x, y = map(own, batch)
    present = own(torch.arange(12) % 3 > 0)
    plain = jd.instancewise(squares)
    fns = {
        "gathered": (jd.distributed.gathered(plain), params),
        "sharded": (jd.distributed.sharded(plain), placed(params, layout)),
        "one by one": (jd.distributed.gathered(one_by_one()), params),
    }
    return {
        kind: whole(pipeline(fns[kind][0], fns[kind][1], x, y, present, size=len(x)))
        for kind in kinds
    }


def one_by_one():
    """Return the objective of one example, mapped."""
    return jd.per_example(lambda p, x, y: squares(p, x.unsqueeze(0), y.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize(("world", "layout"), [(2, "rows"), (4, "replicas")])
def test_examples_of_uneven_batches(world, layout):
    params, (x, y) = examples()
    want = pipeline(jd.instancewise(squares), params, x, y, torch.arange(12) % 3 > 0)
    kinds = ("gathered", "sharded", "one by one")
    for found in workers.run(world, examples_here, kinds, layout):
        for kind in kinds:
            assert_equal(found[kind], want)


def plain(rule, split, x, losses_of, **options):
    """Take two steps by losses of plain autograd; return parameters and state."""
    params = parameters()
    leaves = [leaf.requires_grad_() for leaf in _tree.leaves(params)]
    optimizer, state = torch.optim.SGD(leaves, 0.01), None
    for _ in range(2):
        optimizer.zero_grad()
        features, losses = losses_of(params, x)
        wanted = {"features": features} if split else {}
        state = jd.interop.backward_(losses, params, rule, state, **wanted, **options)
        optimizer.step()
        if getattr(rule, "observe", None) is not None:
            state = rule.observe(losses_of(params, x)[1].detach(), state, **options)
    return _tree.map(torch.Tensor.detach, params), state


def of_features(params, x):
    """Return features, and losses of which the last parameter is in the heads alone."""
    features = torch.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
    targets = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
    return features, (params["gain"] * features.unsqueeze(1) - targets).square().sum(-1).mean(0)


def plain_here(rules):
    """Step with uneven batches in the loop of `backward_`."""
    x = own(data())
    return {
        (split, name): plain(jd.distributed.data_parallel(rule), split, x, of_features, size=len(x))
        for name, rule in rules.items()
        for split in (False, True)
    }


@pytest.mark.parametrize("world", SIZES)
def test_loops_of_plain_autograd_weigh_parts_by_size(world):
    rules = {**RULES, **SCALARIZERS, "dwa": jd.scalarizers.dwa()}
    want = {
        (split, name): plain(rule, split, data(), of_features)
        for name, rule in rules.items()
        for split in (False, True)
    }
    for got in workers.run(world, plain_here, rules):
        assert_equal(got, want)
