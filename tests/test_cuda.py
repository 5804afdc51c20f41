"""What only a GPU shows: nothing waits for it, graphs capture, numbers are those of the CPU.

The most telling come first, what Inductor compiles last, so that `python -m pytest
tests/test_cuda.py tests/kernels` may be stopped at any time.

Last run: 2026-11-28, NVIDIA H100 80GB HBM3, torch 2.11: all passed, but for those that need two
devices.
"""

import gc
import math

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests import scalarizer_registry
from tests.helpers import weighting, weights_of
from tests.registry import METHODS, exported
from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._forms import Outer, cross

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of torch, about streams, precision and its compiler
]
M, N = 6, 24
# Linear programs are solved on the host, and eager the geometric median: see their docstrings.
ON_HOST = {"epo", "pmgda"}
THERE_AND_BACK = {*ON_HOST, "geometric_median"}
ROWS = torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EVERY = pytest.mark.parametrize("name", METHODS)


def setting(name, device, rows=ROWS):
    """Return a rule with its options on a device, a Jacobian, a state and losses."""
    method = METHODS[name]
    with torch.device(device):
        rule = method.make(len(rows))
    jac = {"a": rows[:, :10].to(device), "b": rows[:, 10:].reshape(len(rows), 7, -1).to(device)}
    losses = method.losses(len(rows))
    state = rule.init(jac, key=jd.random.key(0) if method.random else None)  # a key of the host
    return rule, jac, state, None if losses is None else losses.to(device)


def replayed(fn):
    """Capture a call in a CUDA graph after a first one, replay it, and return its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()
    graph.replay()
    torch.cuda.synchronize()
    return result


def without_waiting(fn):
    """Call again; whatever waits for the device is an error."""
    fn()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return fn()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(got, want, tol=1e-8):
    """Compare trees of tensors of both devices."""
    pairs = zip(_tree.leaves(got), _tree.leaves(want), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=tol, atol=tol, equal_nan=True)


def two_calls(rule, jac, state, losses):
    """Aggregate twice; return gradients and state."""
    _, state = rule(jac, state, losses=losses)
    return rule(jac, state, losses=losses)


@EVERY
def test_numbers_are_those_of_the_host(name):
    assert_same(two_calls(*setting(name, "cuda")), two_calls(*setting(name, "cpu")))


@pytest.mark.parametrize("m", [1, 2, 17, 40, 64])
@pytest.mark.parametrize(
    "name", ["upgrad", "dualproj", "mgda", "cagrad", "imtl_g", "aligned_mtl", "nash_mtl", "gradvac"]
)
def test_sizes(name, m):
    rows = torch.randn(m, 2 * m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    weights = []
    for device in ("cuda", "cpu"):
        rule = METHODS[name].make(m)
        state = rule.init(rows.to(device), key=jd.random.key(0))
        weights.append(weighting(rule)((rows @ rows.mT).to(device), state)[0])
    assert_same(*weights)


@EVERY
def test_state_lies_on_the_device(name):
    _, _, state, _ = setting(name, "cuda")
    assert all(leaf.is_cuda for leaf in _tree.leaves(state))


@pytest.mark.parametrize("name", [name for name in METHODS if exported(name) not in THERE_AND_BACK])
def test_nothing_waits(name):
    rule, jac, state, losses = setting(name, "cuda")
    without_waiting(lambda: rule(jac, state, losses=losses))


@pytest.mark.parametrize("name", [name for name in METHODS if exported(name) not in ON_HOST])
def test_a_graph_captures(name):
    rule, jac, state, losses = setting(name, "cuda")
    got = replayed(lambda: rule(jac, state, losses=losses))
    assert_same(got, rule(jac, state, losses=losses))


@EVERY
def test_not_finite_is_seen(name):
    rule, jac, state, losses = setting(name, "cuda")
    if METHODS[name].drops_non_finite or exported(name) in ("graddrop", "geometric_median", "krum"):
        return
    jac["a"][1, 0] = torch.nan
    grads, _ = rule(jac, state, losses=losses)
    assert not all(leaf.isfinite().all() for leaf in _tree.leaves(grads))


@EVERY
def test_absent_rows(name):
    present = torch.tensor([True] * (M - 1) + [False])
    got, want = (
        rule(jac, state, losses=losses, present=present.to(device))
        for device in ("cuda", "cpu")
        for rule, jac, state, losses in [setting(name, device)]
    )
    assert_same(got, want, 1e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@EVERY
def test_the_device_need_not_be_the_current_one(name):
    got = two_calls(*setting(name, "cuda:1"))
    assert_same(got, two_calls(*setting(name, "cpu")))
    assert all(leaf.device.index == 1 for leaf in _tree.leaves(got))


def large(m, n):
    """Return rows."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m), dtype=torch.float64)


@pytest.mark.parametrize("m", [100, 130, 300])
def test_large_quadratic_programs(m):
    rows = large(m, 2 * m)
    gramian = rows @ rows.mT
    want = weights_of(jd.upgrad(), gramian)
    assert_same(weights_of(jd.upgrad(), gramian.cuda()), want)


# Of 256 rows in 128 dimensions, one has systems that rounding spoils.
@pytest.mark.parametrize(("m", "n"), [(256, 128), (256, 32), (140, 70)])
@pytest.mark.parametrize("make", [jd.upgrad, jd.dualproj, jd.mgda])
def test_large_quadratic_programs_of_dependent_rows(make, m, n):
    rows = large(m, n)
    gramian = rows @ rows.mT
    want = weights_of(make(), gramian) @ rows
    got = weights_of(make(), gramian.cuda()).cpu() @ rows
    # Of weights there are many; of directions one.
    assert float((got - want).norm()) <= 1e-6 * float(rows.norm(dim=1).max())


@pytest.mark.parametrize(("m", "n"), [(150, 300), (150, 50)])
def test_large_quadratic_programs_are_captured(m, n):
    rows = large(m, n)
    gramian = (rows @ rows.mT).cuda()
    want = weights_of(jd.upgrad(), gramian)
    got = replayed(lambda: weights_of(jd.upgrad(), gramian))
    assert_same(got @ rows.cuda(), want @ rows.cuda())


@pytest.mark.parametrize("name", scalarizer_registry.METHODS)
def test_scalarizers_capture(name):
    method = scalarizer_registry.METHODS[name]
    with torch.device("cuda"):
        rule = method.make(M)
    losses = torch.rand(M, device="cuda", dtype=torch.float64) + 0.5
    state = rule.init(losses, key=jd.random.key(0))
    got = replayed(lambda: rule(losses, state))
    assert_same(got, rule(losses, state))


def slope(rule, state, rows):
    """Return the derivative of the squared length of a direction."""

    def square(rows):
        return rule(rows, state)[0].square().sum()

    return torch.func.grad(square)(rows)


@pytest.mark.parametrize(
    "name",
    [
        "upgrad",
        "mgda",
        "cagrad",
        "imtl_g",
        "aligned_mtl",
        "config",
        "nash_mtl",
        "pcgrad",
        "gradvac",
        "rlw",
    ],
)
def test_derivatives_are_those_of_the_host(name):
    found = []
    for device in ("cuda", "cpu"):
        rule, _, _, _ = setting(name, device)
        rows = ROWS.to(device)
        state = rule.init(rows, key=jd.random.key(0))
        found.append(slope(rule, state, rows))
    assert_same(*found, tol=1e-6)


@pytest.mark.parametrize(
    "name", ["upgrad", "cagrad", "imtl_g", "nash_mtl", "pcgrad", "gradvac", "rlw"]
)
def test_mapped(name):
    batch = torch.stack([ROWS, 2 * ROWS.flip(0), ROWS.roll(1, 0)]).cuda()
    rule, _, _, _ = setting(name, "cuda")
    state = rule.init(batch[0], key=jd.random.key(0))
    got = torch.func.vmap(lambda rows: rule(rows, state)[0])(batch)
    assert_same(got, torch.stack([rule(rows, state)[0] for rows in batch]))


@pytest.mark.parametrize("seed", [0, 3])
def test_bits_are_those_of_the_host(seed):
    host = jd.random.key(seed)
    device = host.cuda()
    for fn in (
        lambda key: jd.random.bits(key, (7, 3)),
        lambda key: jd.random.uniform(key, (1000,)),
        lambda key: jd.random.split(key, 5),
        lambda key: jd.random.fold_in(key, 4),
        lambda key: jd.random.permutation(key, 30),
        lambda key: torch.func.vmap(jd.random.bits)(jd.random.split(key, 4)),
    ):
        assert torch.equal(fn(device).cpu(), fn(host))


def network(device="cuda"):
    """Return an objective of four losses, parameters and a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)
    apply, params, buffers = jd.functionalize(net)
    x, y = torch.randn(8, 16, device=device), torch.randn(8, 4, device=device)
    return lambda p, x, y: (apply(p, buffers, x)[0] - y).square().mean(0), params, x, y


def instance_wise():
    """Return one loss for each example."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).cuda()
    apply, params, buffers = jd.functionalize(net)
    x, y = torch.randn(12, 16, device="cuda"), torch.randint(4, (12,), device="cuda")

    def losses(p, x, y):
        return nn.functional.cross_entropy(apply(p, buffers, x)[0], y, reduction="none")

    return jd.instancewise(losses), params, x, y


def test_instance_wise_steps():
    objective, params, x, y = instance_wise()
    step = jd.grad(objective, jd.upgrad())
    want = jd.grad(objective, jd.upgrad(), route="jacobian")(None, params, x, y)
    assert_same(without_waiting(lambda: step(None, params, x, y)), want, 1e-4)
    assert_same(replayed(lambda: step(None, params, x, y)), want, 1e-4)


def test_grouped_and_monitored_do_not_wait():
    objective, params, x, y = network()
    inner = jd.grouped(jd.upgrad(), jd.by_tensor)
    rule = jd.monitored(inner, {"cosine": jd.measures.cosine_to_mean})
    state = jd.init_state(rule, objective, params, x, y)
    step = jd.grad_and_value(objective, rule)
    grads, _, after = without_waiting(lambda: step(state, params, x, y))
    assert all(leaf.is_cuda for leaf in _tree.leaves((grads, after)))
    assert math.isfinite(float(jd.read_measures(after)["cosine"]))


def test_float32_and_autocast_steps():
    objective, params, x, y = network()
    with torch.autocast("cuda", torch.bfloat16):
        grads, _ = jd.grad(objective, jd.upgrad())(None, params, x, y)
    want, _ = jd.grad(objective, jd.upgrad())(None, params, x, y)
    assert_same(grads, want, 5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype):
    left, right = (torch.randn(8, 300, 1, 24, device="cuda").to(dtype) for _ in range(2))
    rows = Outer(left, right, (24, 24))
    wide = Outer(left.double(), right.double(), (24, 24))
    want = cross(wide, wide)
    assert_same(cross(rows, rows).double() / want.max(), want / want.max(), 1e-5)


def recurrent(layer, device):
    """Return losses of sequences by the parameters of a recurrent layer, these and a batch."""
    torch.manual_seed(0)
    apply, params, buffers = jd.functionalize(layer().double().to(device))
    x = torch.randn(5, 7, 4, dtype=torch.float64).to(device)

    def fn(params, x):
        outputs, states = apply(params, buffers, x)[0]
        end = states[0] if isinstance(states, tuple) else states
        return outputs.sin().sum((1, 2)) + end.square().sum((0, 2))

    return fn, params, x


RECURRENT = {
    "lstm": lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(4, 3, proj_size=2, batch_first=True),
    "gru": lambda: nn.GRU(4, 3, batch_first=True),
    "rnn": lambda: nn.RNN(4, 3, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    results = []
    for device in ("cpu", "cuda"):
        fn, params, x = recurrent(RECURRENT[name], device)
        objective = jd.instancewise(fn)
        by_route = [jd.gramian(objective, route=r)(params, x) for r in ("layerwise", "jacobian")]
        whole = jd.grad(lambda params, x, fn=fn: fn(params, x)[:2], jd.upgrad())(None, params, x)
        results.append((by_route, jd.jac(fn)(params, x), whole))
    assert_same(results[1], results[0], 1e-7)


def test_recurrent_layers_under_autocast():
    fn, params, x = recurrent(RECURRENT["lstm"], "cuda")
    params, x = {name: value.float() for name, value in params.items()}, x.float()
    full = jd.gramian(jd.instancewise(fn))(params, x)
    for route in ("layerwise", "jacobian"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = jd.gramian(jd.instancewise(fn), route=route)(params, x)
        assert torch.linalg.norm(got - full) < 0.05 * torch.linalg.norm(full)


def test_weights_of_recurrent_layers_stay_where_they_are():
    fn, params, x = recurrent(RECURRENT["lstm"], "cuda")
    before = {name: value.data_ptr() for name, value in params.items()}
    with torch.no_grad():
        fn(params, x)
    jd.gramian(jd.instancewise(fn))(params, x)
    assert {name: value.data_ptr() for name, value in params.items()} == before


def test_layers_share_their_products():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).double()
    apply, params, buffers = jd.functionalize(net)
    gramian = jd.gramian(
        jd.instancewise(lambda p, x: apply(p, buffers, x)[0].square().mean((1, 2)))
    )
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    there = {name: value.cuda() for name, value in params.items()}
    assert_same(gramian(there, x.cuda()), gramian(params, x))


def test_an_ensemble_does_not_wait():
    objective, params, x, y = network()
    step = jd.grad(objective, jd.upgrad())
    members = jd.ensemble.stack([params, {key: 0.5 * value for key, value in params.items()}])
    each = jd.ensemble.each(lambda p, x, y: step(None, p, x, y)[0], shared=(1, 2))
    got = without_waiting(lambda: each(members, x, y))
    for member, own in zip(jd.ensemble.unstack(members), jd.ensemble.unstack(got), strict=True):
        assert_same(own, step(None, member, x, y)[0], 1e-4)


RAYS = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)


def corner(device):
    """Return the reference point of a hypervolume."""
    return torch.full((2,), 2.0, dtype=torch.float64, device=device)


SETS = {
    "moo_svgd": lambda device: jd.sets.moo_svgd(),
    "hypervolume_gradient": lambda device: jd.sets.hypervolume_gradient(corner(device)),
    "pareto_mtl": lambda device: jd.sets.pareto_mtl(RAYS.to(device)),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_are_those_of_the_host(name):
    jacs, losses = ROWS.reshape(3, 2, N), ROWS[:, 0].abs().reshape(3, 2)
    got, want = (
        SETS[name](device)(jacs.to(device), losses=losses.to(device)) for device in ("cuda", "cpu")
    )
    assert_same(got, want, 1e-6)


COMPILED = {
    "upgrad": jd.upgrad,
    "mgda": jd.mgda,
    "cagrad": jd.cagrad,
    "pcgrad": jd.pcgrad,
    "imtl_g": jd.imtl_g,
    "aligned_mtl": jd.aligned_mtl,
    "nash_mtl": jd.nash_mtl,
    "grouped": lambda: jd.grouped(jd.upgrad(), jd.by_tensor),
    "monitored": lambda: jd.monitored(jd.upgrad(), {"w": jd.measures.weights}),
}


def third(fast, *args):
    """Call a compiled step until it replays a graph; return the last result."""
    for _ in range(2):
        torch.compiler.cudagraph_mark_step_begin()
        fast(*args)
    torch.compiler.cudagraph_mark_step_begin()
    return fast(*args)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_into_a_graph(name):
    objective, params, x, y = network()
    rule = COMPILED[name]()
    state = jd.init_state(rule, objective, params, x, y, key=jd.random.key(0))
    step = jd.grad(objective, rule)
    fast = torch.compile(
        lambda s, p, x, y: step(s, p, x, y), fullgraph=True, mode="reduce-overhead"
    )
    want = step(state, params, x, y)
    assert_same(third(fast, state, params, x, y), want, 1e-4)


@pytest.mark.parametrize("make", [jd.imtl_g, jd.cagrad], ids=["imtl_g", "cagrad"])
def test_graphs_are_cut_where_something_waits(make):
    rows = torch.randn(130, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule, want = make(), make()(rows)[0]
    fast = torch.compile(lambda rows: rule(rows)[0], fullgraph=True, mode="reduce-overhead")
    assert_same(third(fast, rows.cuda()), want, 1e-6)


def test_instance_wise_steps_compiled_into_a_graph():
    objective, params, x, y = instance_wise()
    step = jd.grad(objective, jd.upgrad())
    want = step(None, params, x, y)
    fast = torch.compile(
        lambda p, x, y: step(None, p, x, y), fullgraph=True, mode="reduce-overhead"
    )
    assert_same(third(fast, params, x, y), want, 1e-4)


def test_compiled_bits_are_those_of_the_host():
    host = jd.random.key(3)
    fast = torch.compile(lambda key: jd.random.bits(key, (7, 3)), fullgraph=True)
    assert torch.equal(fast(host.cuda()).cpu(), jd.random.bits(host, (7, 3)))
