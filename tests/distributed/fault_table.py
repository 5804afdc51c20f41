"""What comes of each fault, under each way to spread a step, eager and compiled.

python -m tests.distributed.fault_table    # runs all, in some minutes, and prints the table

A process is at fault: its batch is not a number (nan) or shorter (uneven), it has other losses (m)
or other shapes, it alone says `present` or `size`, it leaves a step out (skip), it ends (kill), or
it hangs (stop). The other gets an error in time that names processes and collective, or all get a
result. `tests/distributed/test_fault_table.py` holds what is right, and runs some.
"""

import datetime
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import workers
from tests.distributed.test_data_parallel import data, objective, parameters, part
from tests.distributed.test_gathered import squares
from tests.short import SHORT
from torchjd_func import _tree

TIMEOUT = 1.0  # seconds, of the collectives of a group
SLOW = 240.0  # seconds, that a process may take to compile
KINDS = ("data_parallel", "across_workers", "scalarizer", "sharded", "gathered", "mean")
ANSWERED = ("nan", "m", "shapes", "uneven", "present", "size", "skip")  # by all processes
ENDED = ("kill", "stop")
IMPOSSIBLE = {
    ("gathered", "m"),  # as many as there are examples
    *((kind, "shapes") for kind in ("scalarizer", "sharded", "gathered", "mean")),
    ("mean", "uneven"),  # it is not told
    ("mean", "present"),
}


def cases(names):
    """Return the cases that there are."""
    every = [(kind, case) for kind in KINDS for case in names]
    return [pair for pair in every if pair not in IMPOSSIBLE]


def call(kind, group, case, here):
    """Return a step and its arguments, if the process that is `here` is at fault."""
    x, params, m, options = part(data()), parameters(), 3, {}
    if case == "nan" and here:
        x = x * torch.nan
    if case == "m" and here:
        m = 2
    if case in ("uneven", "size") and here:
        x = x[:-1]
    if case == "shapes" and here:
        params["trunk"]["b"] = params["trunk"]["b"].unsqueeze(0)
    if case == "present" and here:
        options["present"] = torch.ones(len(x) if kind == "gathered" else m, dtype=torch.bool)
    if case == "size" and here:
        options["size"] = len(x)
    fn = objective(m)
    if kind == "mean":
        return lambda: jd.distributed.mean(fn(params, x), group, **options)
    if kind == "sharded":
        params = {**params, "trunk": placed(params["trunk"], group)}
    ways = {
        "data_parallel": lambda: (fn, jd.distributed.data_parallel(SHORT, group)),
        "across_workers": lambda: (fn, jd.distributed.across_workers(jd.krum(1), group)),
        "scalarizer": lambda: (fn, jd.distributed.data_parallel(jd.scalarizers.stch(), group)),
        "sharded": lambda: (jd.distributed.sharded(fn), SHORT),
        "gathered": lambda: (jd.distributed.gathered(jd.instancewise(each), group), SHORT),
    }
    step = jd.grad(*ways[kind]())
    return lambda: step(None, params, x, **options)[0]


def each(params, x):
    """Return a loss for each example."""
    own = {"w": params["trunk"]["w"][:, :3], "v": params["trunk"]["b"].flatten()[:3]}
    return squares(own | {"b": params["gain"]}, x, x[:, 0])


def placed(trunk, group):
    """Return parameters that are sharded over a group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, "cpu")
    chunks = _tree.map(lambda leaf: leaf.reshape(-1).chunk(2)[dist.get_rank()], trunk)
    own = {"w": chunks["w"].reshape(2, 6), "b": chunks["b"].reshape(3, -1).squeeze(1)}
    return {name: DTensor.from_local(leaf, mesh, [Shard(0)]) for name, leaf in own.items()}


def compiled(step, backend):
    """Return a step that is compiled when it is called, at the same time on all processes."""
    from torch._dynamo.backends.registry import lookup_backend

    def together(graph, inputs):
        """Compile, and wait for the others: of different graphs some take longer."""
        fast = lookup_backend(backend)(graph, inputs)
        dist.monitored_barrier(timeout=datetime.timedelta(seconds=SLOW))
        return fast

    torch._dynamo.reset()
    return torch.compile(step, backend=together, fullgraph=True)


def attempt(kind, group, case, here, backend):
    """Return the error of a step, or whether its result is one of numbers."""
    prepare = (lambda step: compiled(step, backend)) if backend else lambda step: step
    try:
        step = prepare(call(kind, group, case, here))
        if case == "skip":
            step()
            if here:
                return "left out"
        grads = step()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return bool(_tree.ravel(_tree.map(lambda x: x.isfinite().all(), locals_of(grads))).all())


def locals_of(tree):
    """Return what this process has of sharded tensors."""
    return _tree.map(lambda x: x.to_local() if hasattr(x, "to_local") else x, tree)


def faults(pairs, backend):
    """Return what comes of each fault of the last process, and after how many seconds."""
    here, outcomes = dist.get_rank() == 1, {}
    for kind, case in pairs:
        dist.barrier()
        group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
        start = time.monotonic()
        told = attempt(kind, group, case, here, backend)
        outcomes[kind, case] = told
        limit = 2 * TIMEOUT + (2 if backend is None else SLOW)
        assert time.monotonic() - start < limit, (kind, case)
    return outcomes


def for_ever(kind, backend, folder):
    """Take steps until one fails; return the error, and how long that step took."""
    step = call(kind, dist.group.WORLD, "nothing", False)
    step = compiled(step, backend) if backend else step
    start, done = time.monotonic(), Path(folder) / str(dist.get_rank())
    try:
        while True:
            start = time.monotonic()
            step()
            done.touch()
    except RuntimeError as error:
        return f"RuntimeError: {error}", time.monotonic() - start


def ended(kind, case, backend, timeout):
    """Return what one process says once the other has ended, or hangs, and after how long."""
    with tempfile.TemporaryDirectory() as folder, workers.crew(2, timeout) as crew:
        crew.send(for_ever, kind, backend, folder)
        end = time.monotonic() + 2 * SLOW
        while len(os.listdir(folder)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        if case == "kill":
            crew.kill(1)
        else:
            os.kill(crew.processes[1].pid or 0, signal.SIGSTOP)
        return crew.answer(0)


DIFFERENT = (
    r"ValueError: `{}[.\w]*` must be the same on all processes, got .* on process 0 and .* on "
    r"process 1\. "
)
LATE = (
    r"RuntimeError: `(all_reduce|reduce_scatter|all_gather|all_to_all)` must reach all 2 "
    r"processes, got an error on process 0: .*another process"
)
EXPECTED = {
    "m": DIFFERENT.format("(losses|jac|tree)"),
    "shapes": DIFFERENT.format("jac"),
    "uneven": DIFFERENT.format("batch") + r"Pass size=len\(x\)",
    "present": DIFFERENT.format("present"),
    "size": DIFFERENT.format("size"),
}


def wrong(kind, case, first, second):
    """Say what is wrong with what two processes say of a fault; nothing if it is right."""
    if case == "nan":  # it spreads, but where it is outvoted
        right = first is second is (kind == "across_workers")
    elif case == "skip":
        right = second == "left out" and re.match(LATE, str(first), re.DOTALL)
    elif case in ENDED:
        right = re.match(LATE, str(first), re.DOTALL)
    else:
        right = first == second and re.match(EXPECTED[case], str(first), re.DOTALL)
    return "" if right else f"{kind}, {case}: {first!r} and {second!r}"


def told(kind, case, backend):
    """Return what two processes say of a fault."""
    if case in ENDED:
        message, seconds = ended(kind, case, backend, 5.0)
        assert seconds < 10.0
        return message, None
    return [outcome[kind, case] for outcome in workers.run(2, faults, [(kind, case)], backend)]


def main():
    """Print the table."""
    for backend in (None, "aot_eager"):
        print("eager" if backend is None else "compiled", flush=True)
        for kind, case in cases(ANSWERED + ENDED):
            first, second = told(kind, case, backend)
            verdict = wrong(kind, case, first, second)
            said = f"WRONG {verdict}" if verdict else str(first)
            print(f"  {kind:15s} {case:8s} {said[:240]}", flush=True)


if __name__ == "__main__":
    main()
