"""Memory and time of a step with sharded parameters, against plain training by FSDP2.

    torchrun --nproc-per-node 2 -m benchmarks.fsdp_memory [--width N] [--layers N]

A perceptron with two losses; each process has a part of the batch. Bytes of tensors that a process
holds beside its part of the parameters, in units of all parameters: the most in a step, what is
there while the rule weighs, and what stays afterwards. CPU, gloo.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

import torchjd_func as jd
from benchmarks._memory import Storages
from torchjd_func.distributed import _mesh

BATCH, LOSSES, REPEATS = 8, 2, 5


class Usage(NamedTuple):
    """What one step needs, in units of all parameters."""

    peak: float
    weighing: float  # while the Gramian is added up; 0 if there is none
    kept: float
    seconds: float


def network(width: int, layers: int) -> nn.Sequential:
    """Return a perceptron, the same on all processes."""
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*hidden, nn.Linear(width, LOSSES))


def split(net: nn.Sequential) -> Any:
    """Return a copy whose layers are sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = copy.deepcopy(net)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def plain(net: nn.Sequential, x: Tensor) -> Usage:
    """Measure the backward pass of the sum of the losses, through the hooks of FSDP2."""
    model = split(net)

    def step() -> None:
        """Leave gradients in `.grad`."""
        model(x).square().mean(0).sum().backward()

    def forget() -> None:
        """Free the gradients."""
        model.zero_grad(set_to_none=True)

    return measured(step, forget, model, net)


def losses_of(net: nn.Sequential) -> Callable[..., Tensor]:
    """Return the losses as a function of whole parameters and a batch."""
    skeleton = copy.deepcopy(net).to("meta")

    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Call the network with these parameters."""
        return functional_call(skeleton, params, (x,)).square().mean(0)

    return losses


def ours(net: nn.Sequential, x: Tensor, rule: jd.Aggregator, chunk_size: int | None) -> Usage:
    """Measure the direction of a rule."""
    model, kept = split(net), []
    params = dict(model.named_parameters())
    run = jd.grad(jd.distributed.sharded(losses_of(net)), rule, chunk_size=chunk_size)
    return measured(lambda: kept.append(run(None, params, x)), kept.clear, model, net)


def measured(
    step: Callable[[], None], forget: Callable[[], None], model: nn.Module, net: nn.Module
) -> Usage:
    """Return what a step needs, once a first one has remembered what there is to."""
    whole, weighing = sum(p.nbytes for p in net.parameters()), [0]
    total = _mesh.total
    step()
    forget()
    with Storages([_mesh.local(p) for p in model.parameters()]) as storages:

        def noting(x: Tensor, mesh: Any) -> Tensor:
            """Note what is there."""
            weighing.append(storages.live())
            return total(x, mesh)

        with mock.patch.object(_mesh, "total", noting):
            step()
        kept = storages.live()
    start = time.perf_counter()
    for _ in range(REPEATS):
        forget()
        step()
    seconds = (time.perf_counter() - start) / REPEATS
    return Usage(storages.peak / whole, weighing[-1] / whole, kept / whole, seconds)


def usage(width: int, layers: int) -> dict[str, Usage]:
    """Measure each way on this process."""
    net = network(width, layers)
    x = torch.randn(BATCH, width)
    return {
        "plain FSDP2, sum of losses": plain(net, x),
        "jd.mean()": ours(net, x, jd.mean(), None),
        "jd.upgrad(), chunk_size=1": ours(net, x, jd.upgrad(), 1),
        "jd.upgrad()": ours(net, x, jd.upgrad(), None),
    }


def main() -> None:
    """Read the options, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = usage(options.width, options.layers)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {LOSSES} losses")
        print("| step | peak | while the rule weighs | kept | ms |\n|---|---|---|---|---|")
        for name, row in rows.items():
            numbers = " | ".join([f"{x:.2f}" for x in row[:3]])
            print(f"| {name} | {numbers} | {1000 * row.seconds:.0f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
