"""A robust rule on one row of each rank, some of which send anything."""

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import registry, workers
from tests.helpers import assert_trees_close
from torchjd_func import _tree

WORLD = 4
M = 2 * WORLD  # rows, two for each rank
ROBUST = {
    "trimmed_mean": jd.trimmed_mean(1),
    "krum": jd.krum(1, 2),
    "krum[distances]": jd.krum(1, squared=False),
    "constant": jd.constant([0.5, 0.25, 0.25, 0.0]),
    "grouped": jd.grouped({"w": jd.krum(1), "b": jd.krum(1, 2)}, lambda path: path),
}
BAD = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30]


def rows(k, dtype=torch.float64):
    """Return `k` rows for each rank, one below the other."""
    draw = jd.random.normal(jd.random.key(4), (WORLD * k, 11), dtype=torch.float64).to(dtype)
    return {"w": draw[:, :6].reshape(WORLD * k, 2, 3), "b": draw[:, 6:]}


def own(tree):
    """Return the rows of this rank."""
    return _tree.map(lambda leaf: leaf.chunk(WORLD)[dist.get_rank()], tree)


def methods():
    """Run every method on the rows of all ranks."""
    found = {}
    for name, method in registry.METHODS.items():
        rule = jd.distributed.across_workers(method.make(M))
        found[name] = call(rule, own(rows(2)), method, own(losses()))
    return found


def losses():
    """Return positive losses."""
    return torch.linspace(0.5, 2.0, M, dtype=torch.float64)


def call(rule, jac, method, values):
    """Aggregate once."""
    return rule(jac, rule.init(jac, key=registry.key_for(method)), losses=values)


def test_ranks_equal_one_process():
    first, *others = workers.run(WORLD, methods)
    for name, method in registry.METHODS.items():
        want = call(method.make(M), rows(2), method, losses())
        assert_trees_close(first[name], want, rtol=1e-10, atol=1e-10)
        for other in others:
            assert_trees_close(other[name], first[name], rtol=0, atol=0)


def attacked(bad, dtype):
    """Aggregate while the last rank sends numbers that are not its gradient."""
    jac = own(rows(1, dtype))
    if dist.get_rank() == WORLD - 1:
        jac = _tree.map(lambda leaf: torch.full_like(leaf, bad), jac)
    rules = {name: jd.distributed.across_workers(rule) for name, rule in ROBUST.items()}
    return {name: rule(jac)[0] for name, rule in rules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", BAD)
def test_one_worker_moves_nothing_further_than_promised(bad, dtype):
    honest = _tree.map(lambda leaf: leaf[:-1], rows(1, dtype))
    low, high = (_tree.map(fn, honest) for fn in (lowest, highest))
    for found in workers.run(WORLD, attacked, bad, dtype):
        for grads in found.values():
            for name, leaf in grads.items():
                assert ((leaf >= low[name]) & (leaf <= high[name])).all()


def lowest(leaf):
    """Return the smallest entry of each column."""
    return leaf.amin(0)


def highest(leaf):
    """Return the largest entry of each column."""
    return leaf.amax(0)


def test_without_robustness_one_worker_is_enough():
    rule = jd.mean()
    jac = torch.tensor([[1.0, 2.0], [1.0, 3.0], [torch.nan, 0.0]])
    assert rule(jac)[0].isnan().any()


def objective(x, centre):
    """Return the one loss of a worker."""
    return (x - centre).square().sum()


def training():
    """Descend on one loss for each rank; the last one pulls the wrong way."""
    rule = jd.distributed.across_workers(jd.krum(1))
    centre = torch.full((3,), -1e6 if dist.get_rank() == WORLD - 1 else 1.0, dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64)
    state = jd.init_state(rule, objective, x, centre)
    step = jd.grad(objective, rule)
    for _ in range(50):
        grads, state = step(state, x, centre)
        x = x - 0.1 * grads
    return x


def test_training_against_a_worker_that_lies():
    for x in workers.run(WORLD, training):
        torch.testing.assert_close(x, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [n for n, r in registry.METHODS.items() if r.make(4).columnwise])
def test_columnwise_methods_take_any_columns(name):
    rule, jac = registry.METHODS[name].make(4), rows(1)["b"]
    for columns in (slice(0, 2), slice(2, 5)):
        torch.testing.assert_close(rule(jac[:, columns])[0], rule(jac)[0][columns], rtol=0, atol=0)


def too_few():
    """Use a rule that needs more rows than there are."""
    return jd.distributed.across_workers(jd.krum(2))(torch.eye(3)[:1])


def test_too_few_workers():
    for failure in workers.outcomes(WORLD, too_few):
        assert failure.kind == "ValueError"
        assert "krum" in failure.message
