"""What all processes have to start from is compared: keys, states, parameters, names of losses."""

import re
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchjd_func as jd
from tests import workers
from torchjd_func import _tree

KINDS = (
    "data_parallel",
    "across_workers",
    "scalarizer",
    "random scalarizer",
    "gathered",
    "sharded",
    "sharded each",
)


def here():
    """Say whether this process is the one at fault."""
    return dist.get_rank() == 1


def losses(params, x):
    """Return three losses."""
    y = x @ params["w"] + params["b"]
    return [y.square().mean(), (y - 3).abs().mean(), y.cos().mean()]


def each(params, x):
    """Return a loss for each example."""
    return (x @ params["w"] + params["b"]).square().sum(1)


def parameters():
    """Return parameters that are the same on all processes."""
    generator = torch.Generator().manual_seed(0)
    draw = {"w": (4, 3), "b": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in draw.items()}


def batch():
    """Return the part of this process."""
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(dist.get_rank()))


def problem(kind, params, fn=losses, rule=None):
    """Return an objective, a rule and parameters that are spread over processes."""
    rule = jd.smoothed(jd.pcgrad()) if rule is None else rule
    ways = {
        "data_parallel": lambda: (fn, jd.distributed.data_parallel(rule)),
        "across_workers": lambda: (fn, jd.distributed.across_workers(rule)),
        "scalarizer": lambda: (fn, jd.distributed.data_parallel(jd.scalarizers.famo())),
        "random scalarizer": lambda: (fn, jd.distributed.data_parallel(jd.scalarizers.random())),
        "gathered": lambda: (jd.distributed.gathered(jd.instancewise(each)), rule),
        "sharded": lambda: (jd.distributed.sharded(fn), rule),
        "sharded each": lambda: (jd.distributed.sharded(jd.instancewise(each)), rule),
    }
    if kind.startswith("sharded"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = params | {"w": distribute_tensor(params["w"], mesh, [Shard(0)])}
    return *ways[kind](), params


def resumed(kind, change, backend):
    """Take a step from a state that is changed on one process."""
    fn, rule, params = problem(kind, parameters())
    key = jd.random.key(0)
    state = jd.init_state(rule, fn, params, batch(), key=key)
    step = jd.grad(fn, rule)
    _, state = step(state, params, batch())
    if here():
        state = _tree.map(CHANGES[change], state)
    step = compiled(step, backend)
    return step(state, params, batch())[1]


CHANGES = {
    "counts and keys": lambda x: x if x.is_floating_point() else x ^ 1,
    "memory": lambda x: 1.5 * x if x.is_floating_point() else x,
    "order of memory": lambda x: x.flip(0) if x.is_floating_point() else x,
    "rounding": lambda x: x * (1 + 1e-6) + 1e-7 if x.is_floating_point() else x,
}
CASES = [
    (kind, change)
    for kind in KINDS
    for change in CHANGES
    if kind != "random scalarizer" or "memory" not in change  # it has none
]


def compiled(step, backend):
    """Return a step that is compiled, if there is a backend."""
    torch._dynamo.reset()
    return torch.compile(step, backend=backend, fullgraph=True) if backend else step


def refused(outcomes, name, remedy):
    """Check that all processes refuse, by name and with a remedy."""
    for outcome in outcomes:
        assert getattr(outcome, "kind", outcome) == "ValueError", outcome
        pattern = rf"`{name}` must be the same on all processes, got .* on process 0 and .*{remedy}"
        assert re.match(pattern, outcome.message), outcome.message


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_states_that_are_not_the_same_are_refused(kind, change):
    if change == "rounding":
        workers.run(2, resumed, kind, change, None)
    else:
        outcomes = workers.outcomes(2, resumed, kind, change, None)
        refused(outcomes, r"state\.\w+(\.\w+)?", "broadcast")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["data_parallel", "gathered", "sharded"])
def test_compiled_steps_compare_states(kind, change):
    if change == "rounding":
        workers.run(2, resumed, kind, change, "aot_eager")
    else:
        outcomes = workers.outcomes(2, resumed, kind, change, "aot_eager")
        refused(outcomes, r"state\.\w+(\.\w+)?", "broadcast")


def begun(kind, way, backend=None):
    """Start from parameters of which one process has others."""
    params = parameters()
    params["b"] = params["b"] + here()
    fn, rule, params = problem(kind, params, rule=jd.upgrad())
    if way == "init_state":
        return jd.init_state(rule, fn, params, batch(), key=jd.random.key(0))
    step = jd.grad(fn, rule)
    step = compiled(step, backend)
    return step(None, params, batch())


@pytest.mark.parametrize("way", ["init_state", "first step"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_not_the_same_are_refused_at_the_start(kind, way):
    if kind != "random scalarizer" or way == "init_state":
        refused(workers.outcomes(2, begun, kind, way), r"parameters\.b", "broadcast")


@pytest.mark.parametrize("kind", ["data_parallel", "gathered", "sharded"])
def test_compiled_first_steps_compare_parameters(kind):
    outcomes = workers.outcomes(2, begun, kind, "first step", "aot_eager")
    refused(outcomes, r"parameters\.b", "broadcast")


def backward():
    """Call `backward_` on modules of which each process has drawn its own."""
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(4, 2)
    rule = jd.distributed.data_parallel(jd.upgrad())
    jd.interop.backward_(model(batch()).square().mean(0), model, rule)


def test_modules_that_each_process_draws_are_refused():
    refused(workers.outcomes(2, backward), r"parameters\.\w+", "broadcast")


def named(kind, way):
    """Take a step on losses whose names come in another order on one process."""

    def ordered(params, x):
        one, other, _ = losses(params, x)
        pairs = [("one", one), ("other", other)]
        return OrderedDict(reversed(pairs) if here() else pairs)

    fn, rule, params = problem(kind, parameters(), ordered, jd.upgrad())
    if way == "grad":
        key = jd.random.key(0)
        state = jd.init_state(rule, fn, params, batch(), key=key) if "random" in kind else None
        return jd.grad(fn, rule)(state, params, batch())
    leaves = _tree.map(torch.nn.Parameter, params)
    return jd.interop.backward_(ordered(leaves, batch()), leaves, rule, key=jd.random.key(0))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("data_parallel", "grad"),
        ("data_parallel", "backward_"),
        ("scalarizer", "grad"),
        ("scalarizer", "backward_"),
        ("sharded", "grad"),
    ],
)
def test_losses_in_another_order_are_refused(kind, way):
    refused(workers.outcomes(2, named, kind, way), "names", "in one order")


def tuned(kind, way):
    """Start a rule that has another option on one process."""
    rule = jd.cagrad(c=0.5 if here() else 0.4)
    fn, rule, params = problem(kind, parameters(), rule=rule)
    if way == "init_state":
        return jd.init_state(rule, fn, params, batch())
    return jd.grad(fn, rule)((), params, batch())


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("data_parallel", "init_state"),
        *((kind, "grad") for kind in ("data_parallel", "across_workers", "gathered", "sharded")),
    ],
)
def test_options_of_rules_that_are_not_the_same_are_refused(kind, way):
    refused(workers.outcomes(2, tuned, kind, way), "rule options", "the same options")


def own_names():
    """Aggregate a loss of each worker, by its own name."""

    def fn(params, x):
        return {str(dist.get_rank()): losses(params, x)[0]}

    return jd.grad(fn, jd.distributed.across_workers(jd.upgrad()))(None, parameters(), batch())


def test_workers_may_have_losses_of_their_own():
    workers.run(2, own_names)


def unchecked(kind):
    """Leave the comparison out."""
    rule = jd.distributed.data_parallel(jd.pcgrad(), check=False)
    fn = jd.distributed.gathered(jd.instancewise(each), check=False)
    fn, rule = (losses, rule) if kind == "data_parallel" else (fn, jd.pcgrad())
    params = parameters()
    params["b"] = params["b"] + here()
    state = jd.init_state(rule, fn, params, batch(), key=jd.random.key(0))
    return jd.grad(fn, rule)(_tree.map(lambda x: x + here(), state), params, batch())


@pytest.mark.parametrize("kind", ["data_parallel", "gathered"])
def test_nothing_is_compared_where_nobody_asks(kind):
    workers.run(2, unchecked, kind)
