"""Half precision inside, float32 outside; a loss scale that adapts, and skips without branching."""

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, compiled, weighting
from torchjd_func import _tree

GENERATOR = torch.Generator().manual_seed(0)
PARAMS = {
    "first": torch.randn(5, 4, generator=GENERATOR),
    "last": torch.randn(4, 2, generator=GENERATOR),
}
X = torch.randn(6, 5, generator=GENERATOR)
ROUTES = ["jacobian", "layerwise", "product"]


def losses_of(params, x):
    return ((x @ params["first"]).tanh() @ params["last"]).square().mean(0)


def instance_losses(params, x):
    return ((x @ params["first"]).tanh() @ params["last"]).square().sum(1)


HEADS = {
    "a": lambda p, z, x: (z @ p).square().mean(),
    "b": lambda p, z, x: (z @ p - 1).square().mean(),
}
MULTITASK = jd.multitask(lambda w, x: (x @ w).tanh(), HEADS)
MULTITASK_PARAMS = (
    PARAMS["first"],
    {"a": PARAMS["last"][:, 0].clone(), "b": PARAMS["last"][:, 1].clone()},
)
OBJECTIVES = {
    "plain": (losses_of, PARAMS),
    "instancewise": (jd.instancewise(instance_losses), PARAMS),
    "accumulate": (jd.accumulate(losses_of, 2), PARAMS),
    "multitask": (MULTITASK, MULTITASK_PARAMS),
}
ROUTED = [
    (name, route)
    for name in OBJECTIVES
    for route in ROUTES
    if (name, route) != ("accumulate", "layerwise")  # microbatches keep rows, not layers
]
every_route = pytest.mark.parametrize(("name", "route"), ROUTED)


@every_route
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_structure_and_returns_float32(name, dtype, route):
    fn, params = OBJECTIVES[name]
    half = jd.cast_floating(fn, dtype)
    assert type(half) is type(fn) or name == "plain"
    step = jd.grad_and_value(half, jd.upgrad(), route=route)
    want = jd.grad_and_value(fn, jd.upgrad(), route=route)(None, params, X)
    got = step(None, params, X)
    assert_same_layout(got, want)
    assert_trees_close(got, want, rtol=0.1, atol=0.1)
    assert not torch.equal(_tree.ravel(got[1]), _tree.ravel(want[1])), "rounded inside"
    if dtype is torch.float16:  # the graph differs in the dtype alone
        return
    fast, counter = compiled(step)
    # A graph without examples has rows by autograd, which round in half precision elsewhere.
    rtol, atol = (0.1, 5e-3) if name == "plain" else (1e-4, 1e-6)
    assert_trees_close(fast(None, params, X), got, rtol=rtol, atol=atol)
    assert counter.graphs == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [jd.upgrad, jd.mgda, jd.dualproj, jd.cagrad])
def test_products_of_many_losses_in_half_precision_are_symmetric(make, dtype):
    """Rounded on both sides of the diagonal apart, they made solvers answer not-a-number."""
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(3))
    half = jd.cast_floating(jd.instancewise(instance_losses), dtype)
    gramian = jd.gramian(half, route="product")(PARAMS, x)
    assert torch.equal(gramian, gramian.mT)
    got, want = (jd.grad(half, make(), route=r)(None, PARAMS, x)[0] for r in ("product", "auto"))
    assert_trees_close(got, want, rtol=0.1, atol=0.02)


def test_only_floating_tensors_are_cast():
    seen = {}

    def fn(params, batch):
        seen.update(batch)
        return params["w"].square(), {"ids": batch["ids"], "name": "aux", "out": batch["x"]}

    batch = {"x": torch.ones(2), "ids": torch.arange(2), "z": torch.ones(1, dtype=torch.cfloat)}
    half = jd.cast_floating(fn, torch.bfloat16)
    _, aux = half({"w": torch.ones(2)}, batch | {"flag": True, "none": None})
    assert seen["x"].dtype == torch.bfloat16
    assert seen["ids"].dtype == torch.int64
    assert seen["z"].dtype == torch.cfloat
    assert seen["flag"] is True
    assert aux["out"].dtype == torch.float32
    assert aux["ids"].dtype == torch.int64
    assert aux["name"] == "aux"


def test_float64_inside_is_more_precise():
    params, x = {"w": torch.full((1,), 1e-4)}, torch.ones(1)

    def fn(params, x):
        return ((x + params["w"] * 1e-4) - x) * 1e8

    assert jd.cast_floating(fn, torch.float64)(params, x).item() == pytest.approx(1.0, rel=1e-3)
    assert not fn(params, x).any()


SCALES = [2.0**10, 2.0**16]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("route", ["auto", "jacobian", "product"])
def test_the_scale_changes_no_number_that_does_not_underflow(name, scale, route):
    fn, params = OBJECTIVES[name]
    objective = jd.loss_scale.scaled(fn, jd.loss_scale.init(scale))
    assert_trees_close(objective(params, X), fn(params, X))
    want = jd.grad_and_value(fn, jd.cagrad(), route=route)(None, params, X)
    got = jd.grad_and_value(objective, jd.cagrad(), route=route)(None, params, X)
    assert_trees_close(got, want, rtol=1e-5, atol=1e-6)
    losses, gramian, vjp_fn = jd.gramian_vjp(objective, params, X, route=route)
    want_losses, want_gramian, want_vjp = jd.gramian_vjp(fn, params, X, route=route)
    weights, _ = weighting(jd.mgda())(want_gramian)
    assert_trees_close(
        (losses, gramian, vjp_fn(weights)),
        (want_losses, want_gramian, want_vjp(weights)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_gradients_that_underflow_come_back():
    def tiny(params, x):
        return losses_of(params, x) * 1e-7

    want = jd.jac(tiny)(PARAMS, X)
    half = jd.cast_floating(lambda params, x: losses_of(params, x) * 2.0**-12, torch.float16)
    shrunk = lambda params, x: half(params, x) * (1e-7 * 2.0**12)  # ruff: ignore[lambda-assignment]
    lost = jd.jac(shrunk)(PARAMS, X)
    kept = jd.jac(jd.loss_scale.scaled(shrunk, jd.loss_scale.init(2.0**16)))(PARAMS, X)
    assert _tree.ravel(lost).count_nonzero() < _tree.ravel(want).numel()
    assert_trees_close(kept, want, rtol=2e-2, atol=2e-2 * 1e-7)


def test_auxiliary_output_is_not_scaled():
    def fn(params, x):
        return losses_of(params, x), {"out": x.mean(0)}

    objective = jd.loss_scale.scaled(fn, jd.loss_scale.init())
    _, (losses, aux), _ = jd.grad_and_value(objective, jd.upgrad(), has_aux=True)(None, PARAMS, X)
    assert_trees_close((losses, aux), fn(PARAMS, X), rtol=1e-6)


def overflow(step):
    return {"w": torch.tensor([1.0, torch.nan if step == "nan" else torch.inf])}


GOOD = {"w": torch.ones(2), "v": [torch.zeros(3)]}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_is_not_finite_is_skipped_and_lowers_the_scale(value):
    state = jd.loss_scale.init(8.0)
    bad = {"w": torch.tensor([1.0, value]), "v": [torch.zeros(3)]}
    after = jd.loss_scale.update(state, bad)
    assert_same_layout(after, state)
    assert (after.scale, after.good_steps, after.finite) == (4.0, 0, False)
    assert_trees_close(jd.loss_scale.keep(after, bad, GOOD), GOOD)
    again = jd.loss_scale.update(after, GOOD)
    assert (again.scale, again.good_steps, again.finite) == (4.0, 1, True)
    assert_trees_close(jd.loss_scale.keep(again, GOOD, bad), GOOD)


def test_the_scale_grows_after_good_steps_in_a_row():
    state, scales = jd.loss_scale.init(1.0), []
    for grads in (GOOD, GOOD, overflow("inf"), GOOD, GOOD, GOOD, GOOD):
        state = jd.loss_scale.update(state, grads, growth=4.0, growth_interval=2)
        scales.append(float(state.scale))
    assert scales == [1.0, 4.0, 2.0, 2.0, 8.0, 8.0, 32.0]


def test_a_float16_training_loop_is_one_graph_and_recovers_from_overflow():
    half = jd.cast_floating(losses_of, torch.float16)
    rule = jd.upgrad()

    def step(params, state, scale, x):
        objective = jd.loss_scale.scaled(half, scale)
        grads, losses, new_state = jd.grad_and_value(objective, rule)(state, params, x)
        scale = jd.loss_scale.update(scale, grads)
        new_params = _tree.map(lambda p, g: p - 0.05 * g, params, grads)
        params, state = jd.loss_scale.keep(scale, (new_params, new_state), (params, state))
        return params, state, scale, losses

    fast, counter = compiled(step)
    params, state, scale = PARAMS, (), jd.loss_scale.init(2.0**40)
    finite, first = [], losses_of(PARAMS, X)
    for _ in range(60):
        params, state, scale, _ = fast(params, state, scale, X)
        finite.append(bool(scale.finite))
    assert not finite[0]
    assert finite[-1]
    assert finite == sorted(finite), "it comes down until it fits, then stays"
    assert counter.graphs == 1
    assert (losses_of(params, X) < 0.7 * first).all()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_normalisation_layers_run_in_bfloat16(norm):
    """Under autocast inside torch.func these fail (torch 2.13)."""
    model = nn.Sequential(nn.Linear(5, 4), norm(4), nn.Linear(4, 2))
    apply, params, buffers = jd.functionalize(model)

    def objective(params, buffers, x):
        outputs, buffers = apply(params, buffers, x)
        return outputs.float().square().mean(0), buffers

    half = jd.cast_floating(objective, torch.bfloat16)
    jac, (_, after) = jd.jac_and_value(half, has_aux=True)(params, buffers, X)
    want, (_, want_after) = jd.jac_and_value(objective, has_aux=True)(params, buffers, X)
    assert_same_layout(jac, want)
    assert_same_layout(after, want_after)
    assert_trees_close(jac, want, rtol=0.2, atol=0.2)


NORMS = {
    "layer": nn.LayerNorm(4),
    "batch": nn.BatchNorm1d(4),
    "batch, evaluated": nn.BatchNorm1d(4).eval(),
    "group": nn.GroupNorm(2, 4),
    "instance": nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("route", ["auto", "jacobian", "layerwise", "product"])
def test_autocast_in_the_objective(norm, route):
    model = nn.Sequential(nn.Linear(5, 4), norm, nn.Linear(4, 3))
    apply, params, buffers = jd.functionalize(model)

    def objective(params, x, reduced=0):
        with torch.autocast("cpu", torch.bfloat16):
            outputs, _ = apply(params, buffers, x)
        return outputs.float().square().mean(reduced)

    want = jd.gramian(objective, route="jacobian", chunk_size=1)(params, X)
    got = jd.gramian(objective, route=route)(params, X)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    assert got.dtype == torch.float32
    if norm.training and isinstance(norm, nn.BatchNorm1d):
        return  # mixes examples
    examples = jd.instancewise(lambda params, x: objective(params, x, 1))
    want = jd.gramian(examples, route="jacobian", chunk_size=1)(params, X)
    got = jd.gramian(examples, route=route)(params, X)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("route", ["auto", "jacobian", "layerwise", "product"])
def test_autocast_around_a_step_is_of_the_objective_alone(name, route):
    fn, params = OBJECTIVES[name]

    def lowered(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return fn(*args)

    step = jd.grad_and_value(fn, jd.mgda(), route=route)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(None, params, X)
        matrix = jd.gramian(fn, route=route)(params, X)
        losses, again, vjp_fn = jd.gramian_vjp(fn, params, X, route=route)
        pulled = vjp_fn(torch.ones(len(matrix)))
        jac = jd.jac(fn)(params, X)
    assert matrix.dtype == torch.float32
    assert_trees_close(losses, got[1])
    if name == "plain":
        want = jd.grad_and_value(lowered, jd.mgda(), route=route)(None, params, X)
        assert_trees_close(got, want, rtol=1e-5, atol=1e-6)
    exact = _tree.gramian(_tree.map(torch.Tensor.double, jac))
    torch.testing.assert_close(again.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.max()))
    if route == "jacobian" and name != "instancewise":
        torch.testing.assert_close(matrix.double(), exact, rtol=1e-5, atol=1e-5)
    shared = pulled[0] if name == "multitask" else pulled
    tol = 5e-2 if route == "product" else 2e-2  # added up in bfloat16 there
    assert_trees_close(shared, _tree.map(lambda leaf: leaf.sum(0), jac), rtol=tol, atol=tol)


def test_autocast_around_a_compiled_step():
    step = jd.grad_and_value(losses_of, jd.mgda())

    def run(params, x):
        with torch.autocast("cpu", torch.bfloat16):
            return step(None, params, x)

    fast, counter = compiled(run)
    assert_trees_close(fast(PARAMS, X), run(PARAMS, X), rtol=1e-5, atol=1e-6)
    assert counter.graphs == 1


def test_running_statistics_stay_in_float32():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=0.01))
    apply, params, buffers = jd.functionalize(model)

    def statistics(params, buffers, x):
        outputs, buffers = apply(params, buffers, x)
        return outputs.square().mean(), buffers

    stored = jd.cast_floating(statistics, torch.bfloat16)
    lost = jd.cast_floating(statistics, torch.bfloat16, keep=lambda path: False)
    half = exact = rounded = buffers
    for _ in range(250):
        half, rounded = stored(params, half, X)[1], lost(params, rounded, X)[1]
        exact = statistics(params, exact, X)[1]
    assert half["1.running_mean"].dtype == torch.float32
    error = (half["1.running_mean"] - exact["1.running_mean"]).abs().max()
    assert error < 0.02 < (rounded["1.running_mean"] - exact["1.running_mean"]).abs().max()


def test_what_comes_back_as_it_went_in_keeps_its_dtype():
    def fn(params, buffers):
        return params["w"].square(), {**buffers, "new": params["w"] * 2}

    frozen = {"frozen": torch.ones(2, dtype=torch.float64), "half": torch.ones(2).bfloat16()}
    half = jd.cast_floating(fn, torch.bfloat16)
    _, after = half({"w": torch.ones(2)}, frozen)
    assert after["frozen"] is frozen["frozen"]
    assert after["half"] is frozen["half"]
    assert after["new"].dtype == torch.float32


@pytest.mark.parametrize(
    "fn", [losses_of, jd.instancewise(instance_losses)], ids=["plain", "instancewise"]
)
def test_a_scaled_objective_keeps_its_route(fn, monkeypatch):
    """No Jacobian is built where none is without a scale."""
    from torchjd_func.differentiate import _linearized, _routes

    calls = []
    real = _linearized.rows_of
    monkeypatch.setattr(_routes, "rows_of", lambda linear: calls.append(1) or real(linear))
    objective = jd.loss_scale.scaled(fn, jd.loss_scale.init(2.0**12))
    got = jd.grad(objective, jd.mgda())(None, PARAMS, X)
    assert bool(calls) == (fn is losses_of)
    assert_trees_close(got, jd.grad(fn, jd.mgda())(None, PARAMS, X), rtol=1e-4, atol=1e-5)


def test_a_scaled_objective_of_a_scalarizer():
    objective = jd.loss_scale.scaled(losses_of, jd.loss_scale.init())
    rule = jd.scalarizers.geometric_mean()
    got = jd.grad(objective, rule)(None, PARAMS, X)
    assert_trees_close(got, jd.grad(losses_of, rule)(None, PARAMS, X), rtol=1e-5, atol=1e-6)


def test_casts_and_scales_in_either_order():
    state = jd.loss_scale.init()
    inside = jd.cast_floating(jd.loss_scale.scaled(losses_of, state), torch.bfloat16)
    outside = jd.loss_scale.scaled(jd.cast_floating(losses_of, torch.bfloat16), state)
    assert_trees_close(jd.jac(inside)(PARAMS, X), jd.jac(outside)(PARAMS, X), rtol=0, atol=0)
