"""What works with tensor-parallel parameters (`parallelize_module`), tried on 4 processes.

python -m tests.distributed.tensor_parallel            # prints the table
python -m tests.distributed.tensor_parallel --write    # puts it into its page
"""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import torchjd_func as jd
from tests import workers
from tests.distributed.test_sharded import whole
from tests.helpers import assert_trees_close
from tests.readme import MANUAL, between, show_or_write

PAGE = MANUAL / "howto/several_processes.md"
START, END = "<!-- tensor-parallel: begin -->", "<!-- tensor-parallel: end -->"
LAYOUTS = ("TP", "FSDP2 and TP", "FSDP2 and TP of some layers")


def network():
    """Return a network and a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return net, torch.randn(8, 6, dtype=torch.float64)


def parallel(layout):
    """Return the network with its layers on the processes, and a copy that nothing has touched."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    net, _ = network()
    model: Any = copy.deepcopy(net)
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if layout == "TP":
        return parallelize_module(model, init_device_mesh("cpu", (4,)), plan), net
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    if layout.endswith("some layers"):
        plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(model, mesh["tensor"], plan)
    return fully_shard(model, mesh=mesh["data"]), net


def losses(net, params, x):
    """Return three losses."""
    return functional_call(net, params, (x,)).square().mean(0)


def examples(net, params, x):
    """Return a loss for each example."""
    return functional_call(net, params, (x,)).square().sum(1)


def uses(fn, each, params, x):
    """Return what is tried with an objective, and with one of examples, by the row of the table."""
    return {
        "`jd.grad`, weights from Gramians": lambda: jd.grad(fn, jd.upgrad())(None, params, x),
        "`jd.grad`, rules that need the rows": lambda: jd.grad(fn, jd.graddrop())(
            jd.init_state(jd.graddrop(), fn, params, x, key=jd.random.key(0)), params, x
        ),
        "`jd.grad`, column by column": lambda: jd.grad(fn, jd.trimmed_mean(1))(None, params, x),
        "`jd.grad`, a Scalarizer": lambda: jd.grad(fn, jd.scalarizers.stch())(None, params, x),
        "`jd.jac`": lambda: jd.jac(fn)(params, x),
        "`jd.gramian`": lambda: jd.gramian(fn)(params, x),
        "one loss for each example": lambda: jd.grad(each, jd.mgda())(None, params, x)[0],
    }


def of_the_module(layout, x):
    """Return what is tried with modules that were parallelised; what fails may spoil them."""
    model, other = parallel(layout)[0], parallel(layout)[0]
    params = dict(model.named_parameters())
    inside = jd.distributed.sharded(functools.partial(losses, model))
    return {
        "the parallelised module in an objective": lambda: jd.grad(inside, jd.upgrad())(
            None, params, x
        ),
        "`jd.functionalize`": lambda: jd.functionalize(other),
        "`jd.interop.backward_`": lambda: jd.interop.backward_(
            other(x).square().mean(0), other, jd.upgrad()
        ),
    }


@functools.cache
def alone():
    """Return what one process makes of the whole batch."""
    net, x = network()
    params = {name: p.detach() for name, p in net.named_parameters()}
    fn, each = functools.partial(losses, net), jd.instancewise(functools.partial(examples, net))
    return {name: use() for name, use in uses(fn, each, params, x).items()}


def tried(layout):
    """Return what comes of each use on this process: nothing, or an error."""
    model, net = parallel(layout)
    x = network()[1].chunk(dist.get_world_size())[dist.get_rank()]
    params = dict(model.named_parameters())
    sharded = jd.distributed.sharded
    fn = sharded(functools.partial(losses, net))
    each = sharded(jd.instancewise(functools.partial(examples, net)))
    told = {}
    for name, use in (uses(fn, each, params, x) | of_the_module(layout, x)).items():
        try:
            found = use()
            if name in alone():
                assert_trees_close(whole(found), alone()[name], rtol=1e-10, atol=1e-12)
            told[name] = ""
        except (ValueError, TypeError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


@functools.cache
def results():
    """Return what comes of each use, by layout."""
    return {layout: workers.run(4, tried, layout)[0] for layout in LAYOUTS}


def table():
    """Return the table."""
    lines = [f"| with `jd.distributed.sharded` | {' | '.join(LAYOUTS)} |", "|---" * 4 + "|"]
    for use in results()["TP"]:
        marks = ["error" if results()[layout][use] else "yes" for layout in LAYOUTS]
        lines.append(f"| {use} | {' | '.join(marks)} |")
    return "\n".join(lines)


def inserted(page):
    """Return the page with the table of now."""
    return between(page, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
