"""Whether scattering rows behind the next backward pass takes time off a step: with gloo, little.

    torchrun --nproc-per-node 2 -m benchmarks.fsdp_overlap [--batch N]

Of a sharded objective with `chunk_size=1`, the library scatters each gradient leaf by leaf once its
backward pass is over, and waits. Here the same step also starts the reduce-scatters, goes on with
the next backward pass, and waits at the end; and, for what there is to win, exchanges nothing. On 2
processes with a core each (shared with other work, 2026-11-26, torch 2.13), medians in ms:

| examples of a process | waits at once | waits at the end | exchanges nothing |
|---|---|---|---|
| 16 | 410 | 360 | 133 |
| 512 | 996 | 955 | 662 |

Gloo exchanges on the cores that the backward pass runs on, so that most of the time stays (of the
shortest times, 236 and 219, 873 and 891), and rows are whole until they are sent. Hence the library
does not. Not measured: networks, and GPUs, where a link works by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import torchjd_func as jd
from benchmarks.fsdp_memory import losses_of, network, split
from torchjd_func import _tree
from torchjd_func.distributed import _collectives

WIDTH, LAYERS, ROUNDS = 512, 8, 10


@contextlib.contextmanager
def at_once() -> Generator[None]:
    """Scatter as the library does."""
    yield


@contextlib.contextmanager
def behind() -> Generator[None]:
    """Scatter behind what comes next; wait where rows are put together."""
    run, stack, works = _collectives._run, _tree.stack, []

    def start(name: str, fn: Callable[..., Any], group: Any, out: Tensor, *sent: Tensor) -> Tensor:
        if name != "reduce_scatter":
            return run(name, fn, group, out, *sent)
        works.append((fn(out, *sent, group=group, async_op=True), sent))
        return out

    def wait(parts: Any) -> Any:
        while works:
            works.pop()[0].wait()
        return stack(parts)

    with mock.patch.object(_collectives, "_run", start), mock.patch.object(_tree, "stack", wait):
        yield


@contextlib.contextmanager
def never() -> Generator[None]:
    """Keep the own part of the own rows, for the time of all but the exchange."""
    run = _collectives._run

    def keep(name: str, fn: Callable[..., Any], group: Any, out: Tensor, *sent: Tensor) -> Tensor:
        if name != "reduce_scatter":
            return run(name, fn, group, out, *sent)
        return out.copy_(sent[0][: len(out)])

    with mock.patch.object(_collectives, "_run", keep):
        yield


WAYS = {"waits at once": at_once, "waits at the end": behind, "exchanges nothing": never}


def measure(batch: int) -> dict[str, list[float]]:
    """Return the times of a step each way, in turns."""
    net = network(WIDTH, LAYERS)
    params, x = dict(split(net).named_parameters()), torch.randn(batch, WIDTH)
    step = jd.grad(jd.distributed.sharded(losses_of(net)), jd.upgrad(), chunk_size=1)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            dist.barrier()
            start = time.perf_counter()
            with way():
                step(None, params, x)
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Read the options, and print the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="of a process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, times in measure(options.batch).items():
        if dist.get_rank() == 0:
            middle, least = 1000 * statistics.median(times), 1000 * min(times)
            print(f"{name:18s} median {middle:5.0f} ms, shortest {least:5.0f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
