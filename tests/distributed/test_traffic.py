"""The bytes of a step are those that the docstrings count."""

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from benchmarks._traffic import traffic
from tests import workers

M, SIZES = 3, {"a": 7, "b": 10}  # rows; columns of leaves
N = sum(SIZES.values())
CHECK = 4 * 8  # bytes, of four numbers
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


def sharded(chunk_size):
    """Return the transfers of a step with sharded parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {
        name: distribute_tensor(torch.ones(size, 2), mesh, [Shard(0)])
        for name, size in SIZES.items()
    }
    scales = torch.arange(1.0, M + 1)
    objective = jd.distributed.sharded(lambda p: scales * (p["a"].sum() + p["b"].square().sum()))
    with traffic() as transfers:
        jd.grad(objective, jd.upgrad(), chunk_size=chunk_size)(None, params)
    return transfers


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_rows_are_scattered_leaf_by_leaf_after_each_backward_pass(chunk_size, world):
    leaves = [2 * 4 * padded(world, size) for size in SIZES.values()]
    chunks = {None: [M], 1: [1] * M, 2: [2, 1]}[chunk_size]
    want = [
        *(("all_gather", size) for size in leaves),  # whole parameters
        ("all_reduce", CHECK),
        ("all_reduce", M * 4),  # losses
        *(("reduce_scatter", rows * size) for rows in chunks for size in leaves),
        ("all_reduce", M * M * 8),
    ]
    assert workers.run(world, sharded, chunk_size) == [want] * world
