"""Objectives that decide by their data, so that each process uses parameters in its own way."""

from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import torchjd_func as jd
from tests import workers
from tests.distributed.test_gathered import said
from tests.distributed.test_sharded import placed, whole
from tests.helpers import assert_trees_close

CODE = 100.0  # of the process, in the data: shifts what decides


def shifted(x):
    """Say whether these are the data of the second process; of none nothing is known."""
    return len(x) > 0 and bool(x[0, 0] > CODE / 2)


def another_layer(p, x):
    """Use another layer on each process."""
    return F.linear(x.sin(), p["b" if shifted(x) else "a"]).tanh().sum(1)


def one_layer_alone(p, x):
    """Use a layer on one process alone, after one that all use."""
    h = F.linear(x.sin(), p["a"])
    return (F.linear(h, p["c"]) if shifted(x) else h).square().sum(1)


def another_operation(p, x):
    """Look up on one process, multiply on the other."""
    table, x = p["a"], x.sin()
    return ((table[(x[:, 0] > 0).long()] if shifted(x) else x @ table.T) * x).sin().sum(1)


def used_more_often(p, x):
    """Use a layer twice on one process, with a transpose."""
    h = F.linear(x.sin(), p["c"])
    return (F.linear(h, p["c"].T) if shifted(x) else h).square().sum(1)


def no_form(p, x):
    """Use a layer in a way without a form on one process."""
    w = p["a"]
    return (torch.cdist(x.sin(), w) if shifted(x) else F.linear(x.sin(), w)).square().sum(1)


WAYS = (another_layer, one_layer_alone, another_operation, used_more_often, no_form)
SIZES = ((4, 4), (5, 2), (3, 0))


def parameters():
    """Return layers of three features."""
    draw = jd.random.normal(jd.random.key(0), (3, 3, 3), dtype=torch.float64)
    return dict(zip("abc", draw, strict=True))


def part(process, size, seed=1):
    """Return the data of a process, which tell it from others."""
    key = jd.random.fold_in(jd.random.key(seed), process)
    return jd.random.normal(key, (size, 3), dtype=torch.float64) + CODE * process


def of_examples(objective, params, batches, **options):
    """Return what transforms make of one loss for each example."""
    first, second = batches
    grouped = jd.grouped(jd.mgda(), jd.by_tensor)
    return {
        "grads": jd.grad_and_value(objective, jd.upgrad())(None, params, first, **options),
        "groups": jd.grad(objective, grouped)(None, params, first, **options),
        "norms": jd.row_norms(objective)(params, first, **options),
        "cross": jd.cross_gramian(objective)(params, (first,), (second,), **options),
    }


def of_means(objective, params, batches, **options):
    """Return what a rule makes of two losses that are means over a batch."""
    return jd.grad(objective, jd.upgrad())(None, params, batches[0], **options)


def two(fn):
    """Return two losses that are means."""

    def losses(params, x):
        each = fn(params, x)
        return each.mean(), (each - 1).square().mean()

    return losses


def spread(kind, sizes):
    """Return what this process finds for each way."""
    process, found = dist.get_rank(), {}
    batches = [part(process, sizes[process], seed) for seed in (1, 2)]
    params, wrap = parameters(), getattr(jd.distributed, kind)
    params = placed(params, "rows") if kind == "sharded" else params
    for fn in WAYS:
        objectives = {of_examples: wrap(jd.instancewise(fn))}
        if kind == "sharded":
            objectives[of_means] = wrap(two(fn))
        for run, objective in objectives.items():
            jd.init_state(jd.upgrad(), objective, params, batches[0])
            out = run(objective, params, batches, size=sizes[process])
            found[fn.__name__, run.__name__] = whole(out)
    return found


def joined(fn, sizes):
    """Return the losses of all processes in one; batches are lists of their data."""
    return lambda params, batch: torch.cat(
        [fn(params, x) for x, size in zip(batch, sizes, strict=True) if size]
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["gathered", "sharded"])
def test_processes_that_go_other_ways_equal_one_process(kind, sizes):
    batches = [[part(k, size, seed) for k, size in enumerate(sizes)] for seed in (1, 2)]
    first, other = workers.run(2, spread, kind, sizes)
    assert_trees_close(first, other, rtol=0, atol=0)
    for fn in WAYS:
        alone = joined(fn, sizes)
        want = of_examples(alone, parameters(), batches)
        assert_trees_close(first[fn.__name__, "of_examples"], want, rtol=1e-9, atol=1e-10)
        if kind == "sharded":
            want = of_means(two(alone), parameters(), batches)
            assert_trees_close(first[fn.__name__, "of_means"], want, rtol=1e-9, atol=1e-10)


def compiled():
    """Return what graphs say that use other layers."""
    process = dist.get_rank()
    name = "ab"[process]
    objective = jd.instancewise(lambda p, x: F.linear(x, p[name]).sum(1))
    step = jd.gramian(jd.distributed.gathered(objective))
    x = part(process, 4)
    step(parameters(), x)
    torch._dynamo.reset()
    return said(lambda: torch.compile(step, backend="aot_eager", fullgraph=True)(parameters(), x))


def test_graphs_that_go_other_ways_are_an_error():
    first, other = workers.run(2, compiled)
    assert first == other
    assert first.startswith("ValueError: `operations.0 (3, 3)` must be the same on all processes")
    assert "got linear on process 0 and nothing on process 1. Give each" in first


def another_order():
    """Return what is said of parameters in another order on each process."""
    process, x = dist.get_rank(), part(dist.get_rank(), 4)
    turned = OrderedDict(sorted(parameters().items(), reverse=bool(process)))
    step = jd.grad(
        lambda p, x: F.linear(x, p["a"] * p["b"] * p["c"]).mean(0),
        jd.distributed.data_parallel(jd.upgrad()),
    )
    return said(lambda: step(None, turned, x)), said(lambda: jd.distributed.mean(turned))


def test_another_order_is_an_error():
    first, other = workers.run(2, another_order)
    assert first == other
    for message in first:
        assert message.startswith("ValueError: `order` must be the same on all processes, got ")
