"""Collectives as pure functions, and the processes that tests run them in."""

import torch
import torch.distributed as dist

from tests import workers
from torchjd_func.distributed import _collectives

M, N = 3, 5


def rows(rank):
    """Return what a rank holds."""
    return torch.arange(M * N, dtype=torch.float64).reshape(M, N) * (rank + 1)


def collect(world, backend):
    """Run every collective once."""
    assert dist.get_world_size() == world
    x = rows(dist.get_rank())
    names = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")

    def step(x):
        return {name: getattr(_collectives, name)(x, dist.group.WORLD) for name in names}

    found = (torch.compile(step, backend=backend, fullgraph=True) if backend else step)(x)
    assert torch.equal(x, rows(dist.get_rank()))
    return found


def check(world, backend):
    """Compare with the same sums and parts in this process."""
    every = [rows(rank) for rank in range(world)]
    width = -(-N // world)
    for rank, got in enumerate(workers.run(world, collect, world, backend)):
        own = slice(rank * width, (rank + 1) * width)
        torch.testing.assert_close(got["all_reduce"], torch.stack(every).sum(0))
        torch.testing.assert_close(got["all_gather"], torch.cat(every))
        pad = torch.nn.functional.pad
        padded = [pad(part, (0, world * width - N)) for part in every]
        torch.testing.assert_close(got["reduce_scatter"], torch.stack(padded).sum(0)[:, own])
        torch.testing.assert_close(got["all_to_all"], torch.cat(padded)[:, own])


def test_two():
    check(2, None)
    check(2, "aot_eager")


def test_four():
    check(4, None)
