"""Objectives that only some processes have, or none."""

import functools

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import scalarizer_registry, workers
from tests.helpers import assert_trees_close, compiled
from tests.short import COLUMNS, ROWS, SHORT, SIZE
from torchjd_func import _tree

HERE = torch.tensor([[True, True, False, False], [True, False, True, False]])  # by process
NOT_HERE = torch.tensor([[False] * 4, [True, False, False, True]])
NOWHERE = torch.zeros(2, 4, dtype=torch.bool)
MASKS = {"some": HERE, "none on one process": NOT_HERE, "none": NOWHERE}

RULES = {
    "short": SHORT,
    "rows": ROWS,
    "columns": COLUMNS,
    "size": SIZE,
    "grouped": jd.grouped(SHORT, jd.by_tensor),
    "smoothed": jd.smoothed(SHORT),
    "monitored": jd.monitored(SHORT, {"norms": jd.measures.row_norms}),
}


def draws(world, shape):
    """Return numbers for each process."""
    return jd.random.normal(jd.random.key(4), (world, *shape), dtype=torch.float64)


def jacobians():
    """Return the rows of each process."""
    numbers = draws(2, (4, 9))
    return [{"a": x[:, :6].reshape(4, 2, 3), "b": x[:, 6:]} for x in numbers]


def spoil(tree, mask):
    """Return leaves that are not numbers where an objective is absent."""
    return _tree.map(lambda leaf: torch.where(_tree.per_row(mask, leaf), leaf, torch.nan), tree)


def mean_of_present(trees, masks):
    """Return the mean over the processes that have an objective; zeros if none has."""

    def mean(*leaves):
        flags = [_tree.per_row(mask, leaf) for mask, leaf in zip(masks, leaves, strict=True)]
        kept = [torch.where(flag, leaf, 0) for flag, leaf in zip(flags, leaves, strict=True)]
        count = torch.stack(flags).sum(0).clamp(min=1)
        return torch.stack(kept).sum(0) / count

    return _tree.map(mean, *trees)


def experienced(rule):
    """Return a state after a call that has all objectives."""
    return rule(jacobians()[0], losses=draws(1, (4,))[0].exp())[1]


def steps(make, compile_it):
    """Aggregate with each mask, by each rule, from the same state."""
    rank, found = dist.get_rank(), {}
    losses = draws(2, (4,)).exp()[rank]

    def run(mask, jac, losses, states):
        return {
            name: make(rule)(jac, states[name], losses=losses, present=mask)
            for name, rule in RULES.items()
        }

    fast, counter = compiled(run) if compile_it else (run, None)
    for name, masks in MASKS.items():
        states = {key: experienced(rule) for key, rule in RULES.items()}
        jac = spoil(jacobians()[rank], masks[rank])
        found[name] = fast(masks[rank], jac, spoil(losses, masks[rank]), states)
    assert counter is None or counter.graphs == 1
    return found


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_means_are_over_the_processes_that_have_an_objective(compile_it):
    for found in workers.run(2, steps, jd.distributed.data_parallel, compile_it):
        for name, masks in MASKS.items():
            jac = mean_of_present(jacobians(), masks)
            losses = mean_of_present(list(draws(2, (4,)).exp()), masks)
            for key, rule in RULES.items():
                want = rule(jac, experienced(rule), losses=losses, present=masks.any(0))
                assert_trees_close(found[name][key], want, rtol=1e-8)


def rows_of_workers():
    """Aggregate rows of which some workers have none."""
    rank, found = dist.get_rank(), {}
    for name, masks in MASKS.items():
        for key, rule in RULES.items():
            spread = jd.distributed.across_workers(rule)
            jac = spoil(jacobians()[rank], masks[rank])
            losses = spoil(draws(2, (4,)).exp()[rank], masks[rank])
            state = spread.init(jac)
            found[name, key] = spread(jac, state, losses=losses, present=masks[rank])
    return found


def test_workers_say_which_rows_there_are():
    jac, losses = _tree.cat(jacobians()), draws(2, (4,)).exp().flatten()
    for found in workers.run(2, rows_of_workers):
        for (name, key), got in found.items():
            rule, mask = RULES[key], MASKS[name].flatten()
            assert_trees_close(got, rule(jac, rule.init(jac), losses=losses, present=mask))


def fn(x, shift):
    """Return four positive losses."""
    return (x - torch.arange(4, dtype=x.dtype) * shift).square() + 0.5


def scalarized():
    """Take two steps of each scalarizer, with observations."""
    rank, found = dist.get_rank(), {}
    for name, method in scalarizer_registry.METHODS.items():
        rule = jd.distributed.data_parallel(method.make(4))
        losses = functools.partial(fn, shift=1.0 + rank)
        found[name] = two_steps(
            rule, method, lambda x, f=losses: spoil(f(x), HERE[rank]), HERE[rank]
        )
    return found


def two_steps(rule, method, objective, mask):
    """Take two steps; return parameters and state."""
    x = torch.full((4,), 0.7, dtype=torch.float64)
    state = rule.init(fn(x, 1.0), key=scalarizer_registry.key_for(method))

    def loss(x):
        return rule(objective(x), state, present=mask)

    for _ in range(2):
        grads, after = torch.func.grad(loss, has_aux=True)(x)
        x = x - 0.01 * (grads if rule.processes is None else rule.processes.average(grads))
        if rule.observe is not None:
            later = objective(x) if method.observes == "losses" else None
            after = rule.observe(later, after, present=mask)
        state = after
    return x, state


@functools.cache
def alone():
    """Take the same steps in this process, on the means."""

    def objective(x):
        return mean_of_present([fn(x, 1.0), fn(x, 2.0)], HERE)

    return {
        name: two_steps(method.make(4), method, objective, HERE.any(0))
        for name, method in scalarizer_registry.METHODS.items()
    }


def test_scalarizers_are_of_the_means_that_there_are():
    for found in workers.run(2, scalarized):
        for name, want in alone().items():
            assert_trees_close(found[name], want, rtol=1e-8)


def tasks():
    """Return an objective of three heads, the last of which has two losses."""
    heads = {
        "a": lambda p, z, x: (z @ p).square().mean(),
        "b": lambda p, z, x: (z @ p - 1).square().mean(),
        "c": lambda p, z, x: torch.stack([(z @ p).square().mean(), (z @ p + 1).square().mean()]),
    }
    return jd.multitask(lambda w, x: torch.tanh(x @ w), heads)


def tasks_params():
    """Return the parameters of the trunk and of the heads."""
    numbers = draws(1, (18,))[0]
    return numbers[:9].reshape(3, 3), {
        "a": numbers[9:12],
        "b": numbers[12:15],
        "c": numbers[15:],
    }


def flags(mask, bools):
    """Return which losses there are, by the names of the heads."""
    if bools:
        a, b, c, _ = mask.tolist()
        return {"a": a, "b": b, "c": c}
    return {"a": mask[:1], "b": mask[1:2], "c": mask[2:]}


def heads(rules, masks):
    """Differentiate heads, of which this process has some."""
    x, mask = draws(2, (3, 3))[dist.get_rank()], masks[dist.get_rank()]
    return {
        name: jd.grad(tasks(), jd.distributed.data_parallel(rule))(
            None, tasks_params(), x, present=flags(mask, False)
        )[0]
        for name, rule in rules.items()
    }


@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_heads_are_means_over_the_processes_that_have_them(name):
    masks = MASKS[name]
    rules = {"rows": jd.upgrad(), "scalarizer": jd.scalarizers.mean()}
    losses = [functools.partial(by_rows, x=x) for x in draws(2, (3, 3))]

    def mean(params):
        return mean_of_present([fn(params) for fn in losses], masks)

    shared = torch.zeros(4, 3, 3, dtype=torch.float64)
    own = {key: torch.zeros(4, 3, dtype=torch.float64) for key in "abc"}
    if masks.any():
        shared, own = jd.jac(mean)(tasks_params())
    direction, _ = jd.upgrad()(shared, present=masks.any(0))
    plain = {key: leaf.sum(0) for key, leaf in own.items()}
    count = masks.any(0).sum().clamp(min=1)
    mean_loss = jd.constant((masks.any(0).double() / count).tolist())
    weighed = mean_loss((shared, own))[0]
    for got in workers.run(2, heads, rules, masks):
        assert_trees_close(got["rows"], (direction, plain))
        assert_trees_close(got["scalarizer"], weighed)


def by_rows(params, x):
    """Return the losses of all heads as one vector."""
    return _tree.ravel(tasks()(params, x))


def absent_heads():
    """Leave heads out by Python bools, each on another process."""
    rank, x = dist.get_rank(), draws(2, (3, 3))[dist.get_rank()]
    present = {"a": rank == 0, "b": False, "c": [True, rank == 1]}
    step = jd.grad(tasks(), jd.distributed.data_parallel(jd.upgrad()))
    return step(None, tasks_params(), x, present=present)[0][1]


def test_heads_that_one_process_leaves_out():
    first, second = workers.run(2, absent_heads)
    assert_trees_close(first, second, rtol=0, atol=0)
    losses = [functools.partial(by_rows, x=x) for x in draws(2, (3, 3))]
    (_, own), (_, other) = [jd.jac(fn)(tasks_params()) for fn in losses]
    torch.testing.assert_close(first["a"], own["a"][0])
    torch.testing.assert_close(first["b"], torch.zeros_like(first["b"]))
    last = (own["c"][2] + other["c"][2]) / 2 + other["c"][3]
    torch.testing.assert_close(first["c"], last)
