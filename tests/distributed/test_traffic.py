"""The bytes of a step are those that the docstrings count."""

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from benchmarks._traffic import traffic
from tests import workers

M, SIZES = 3, {"a": 7, "b": 10}  # rows; columns of leaves
N = sum(SIZES.values())
CHECK = 2 * 8  # bytes, of two numbers
BYTES = {torch.float32: 4, torch.float64: 8}
RULES = {
    "upgrad": jd.upgrad(),
    "grouped": jd.grouped(jd.upgrad(), jd.by_tensor),
    "mean": jd.mean(),
    "trimmed_mean": jd.trimmed_mean(1),
    "moco": jd.moco(),
}


def padded(world, *sizes):
    """Return the numbers of columns, each rounded up to a multiple of the ranks."""
    return sum(-(-size // world) * world for size in sizes)


def counted(name, stacked, dtype):
    """Return the bytes of one call on `M` rows in all."""
    world = dist.get_world_size()
    make = jd.distributed.across_workers if stacked else jd.distributed.data_parallel
    rule = make(RULES[name])
    jac = {leaf: torch.ones(M, size, dtype=dtype) for leaf, size in SIZES.items()}
    state = rule.init(jac)
    with traffic() as transfers:
        rule(jac, state, losses=torch.ones(M, dtype=dtype))
    return sum(size for _, size in transfers), world


def formula(name, k, m, world):
    """Return the numbers of one call, `k` rows of each process, `m` in all, and of a Gramian."""
    whole, apart = padded(world, N), padded(world, *SIZES.values())
    return {
        "upgrad": ((k + 1) * whole + m, m**2),
        "grouped": ((k + 1) * apart + m, 2 * m**2),
        "mean": (N + m, 0),
        "trimmed_mean": ((k + 1) * whole + m, 0),
        "moco": (m * N + m, 0),
    }[name]


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RULES)
def test_bytes_of_a_step(name, world, stacked, dtype):
    m = M * world if stacked else M
    numbers, products = formula(name, M, m, world)
    want = numbers * BYTES[dtype] + products * BYTES[torch.float64] + CHECK
    assert workers.run(world, counted, name, stacked, dtype) == [(want, world)] * world


def scalarized():
    """Return the bytes of a step of a scalarizer."""
    rule = jd.distributed.data_parallel(jd.scalarizers.stch())
    params = {leaf: torch.ones(size) for leaf, size in SIZES.items()}
    step = jd.grad(lambda p: {leaf: value.square().sum() for leaf, value in p.items()}, rule)
    state = jd.init_state(rule, lambda p: [p["a"].sum(), p["b"].sum()], params)
    with traffic() as transfers:
        step(state, params)
    return transfers


def test_bytes_of_a_scalarizer():
    want = [("all_reduce", CHECK), ("all_reduce", 2 * 4), ("all_reduce", N * 4)]
    assert workers.run(2, scalarized) == [want] * 2
