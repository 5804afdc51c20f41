"""Each fault, under each way to spread a step: an error that names it in time, or a result."""

import datetime
import re
import time

import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import workers
from tests.distributed.test_data_parallel import data, objective, parameters, part
from tests.distributed.test_gathered import squares
from torchjd_func import _tree

TIMEOUT = 1.0  # seconds, of the collectives of a group
KINDS = ("data_parallel", "across_workers", "scalarizer", "sharded", "gathered", "mean")


def step(kind, group, case, here):
    """Take one step, in which the process that is `here` is at fault."""
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
        return jd.distributed.mean(fn(params, x), group, **options)
    if kind == "gathered":
        spread = jd.distributed.gathered(jd.instancewise(examples), group)
        return jd.grad(spread, jd.upgrad())(None, params, x, **options)[0]
    if kind == "sharded":
        return sharded(fn, group, params, x, options)
    rules = {
        "data_parallel": lambda: jd.distributed.data_parallel(jd.upgrad(), group),
        "across_workers": lambda: jd.distributed.across_workers(jd.krum(1), group),
        "scalarizer": lambda: jd.distributed.data_parallel(jd.scalarizers.stch(), group),
    }
    return jd.grad(fn, rules[kind]())(None, params, x, **options)[0]


def examples(params, x):
    """Return a loss for each example."""
    own = {"w": params["trunk"]["w"][:, :3], "v": params["trunk"]["b"].flatten()[:3]}
    return squares(own | {"b": params["gain"]}, x, x[:, 0])


def sharded(fn, group, params, x, options):
    """Differentiate by parameters that are sharded over a group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, "cpu")
    chunks = _tree.map(lambda leaf: leaf.reshape(-1).chunk(2)[dist.get_rank()], params["trunk"])
    w, b = chunks["w"].reshape(2, 6), chunks["b"].reshape(3, -1).squeeze(1)
    places = {
        name: DTensor.from_local(leaf, mesh, [Shard(0)]) for name, leaf in (("w", w), ("b", b))
    }
    spread = jd.distributed.sharded(fn)
    return jd.grad(spread, jd.upgrad())(None, {**params, "trunk": places}, x, **options)[0]


def faults(cases):
    """Return what comes of each fault of the last process, and after how many seconds."""
    here, outcomes = dist.get_rank() == 1, {}
    for kind, case in cases:
        limit = datetime.timedelta(seconds=TIMEOUT)
        group = dist.new_group(timeout=limit)
        start = time.monotonic()
        outcomes[kind, case] = attempt(kind, group, case, here), time.monotonic() - start
    return outcomes


def attempt(kind, group, case, here):
    """Return the error of a step, or whether its result is one of numbers."""
    try:
        step(kind, group, "nothing", here)
        if case == "skip" and here:
            return "left out"
        grads = step(kind, group, case, here)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return bool(_tree.ravel(_tree.map(lambda x: x.isfinite().all(), locals_of(grads))).all())


def locals_of(tree):
    """Return what this process has of sharded tensors."""
    return _tree.map(lambda x: x.to_local() if hasattr(x, "to_local") else x, tree)


DIFFERENT = (
    r"ValueError: `{}[.\w]*` must be the same on all processes, got .* on process 0 and .* on "
)
LATE = (
    r"RuntimeError: `\w+` must reach all 2 processes, got an error on process 0: .*another process"
)
EXPECTED = {
    "m": DIFFERENT.format("(losses|jac|tree)") + "process 1",
    "shapes": DIFFERENT.format("jac") + "process 1",
    "uneven": DIFFERENT.format("batch") + r"process 1\. Pass size=len\(x\)",
    "present": DIFFERENT.format("present") + "process 1",
    "size": DIFFERENT.format("size") + "process 1",
}
CASES = [
    (kind, case)
    for kind in KINDS
    for case in ("nan", "m", "shapes", "uneven", "present", "size", "skip")
    if (kind, case)
    not in {
        ("gathered", "m"),  # as many as there are examples
        *((kind, "shapes") for kind in ("scalarizer", "sharded", "gathered", "mean")),
        ("mean", "uneven"),  # it is not told
        ("mean", "present"),
    }
]


def test_each_fault_is_an_error_in_time_or_a_result():
    first, second = workers.run(2, faults, CASES)
    for name, (told, seconds) in first.items():
        kind, case = name
        other, later = second[name]
        assert max(seconds, later) < 2 * TIMEOUT + 2, name
        if case == "nan":
            assert told is other is (kind in ("across_workers",)), name
        elif case == "skip":
            assert other == "left out", name
            assert re.match(LATE, told, re.DOTALL), (name, told)
        else:
            assert told == other, name
            assert re.match(EXPECTED[case], str(told), re.DOTALL), (name, told)
