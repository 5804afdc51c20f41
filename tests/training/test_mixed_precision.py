"""A convolutional network with BatchNorm in half precision, in all the ways that there are."""

import copy

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_trees_close
from tests.registry import METHODS, key_for
from torchjd_func import _tree

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(8, 1, 6, 6, generator=GENERATOR)
Y = torch.randn(8, 2, generator=GENERATOR)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        )


APPLY, PARAMS, BUFFERS = jd.functionalize(network())


def losses_of(outputs, y):
    return (outputs.float() - y).square().mean(0)


def objective(params, buffers, x, y):
    outputs, buffers = APPLY(params, buffers, x)
    return losses_of(outputs, y), buffers


def autocast_inside(params, buffers, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        outputs, buffers = APPLY(params, buffers, x)
    return losses_of(outputs, y), buffers


def step_of(fn, around=False, **options):
    """Return a step, which may be called under autocast."""
    step = jd.grad_and_value(fn, jd.upgrad(), has_aux=True, **options)

    def run(*args):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            return step(None, *args)

    return run


WAYS = {
    "autocast inside": step_of(autocast_inside),
    "autocast around": step_of(objective, around=True),
    "autocast around, by products": step_of(objective, around=True, route="product"),
    "autocast around, layer by layer": step_of(objective, around=True, route="layerwise"),
    "cast_floating": step_of(jd.cast_floating(objective, torch.bfloat16)),
    "cast_floating, float16": step_of(jd.cast_floating(objective, torch.float16)),
    "microbatches": step_of(
        jd.accumulate(jd.cast_floating(objective, torch.bfloat16), 1, has_aux=True, carry_aux=1)
    ),
}


@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
def test_gradients_and_statistics_are_float32_and_near(run):
    want, (_, want_buffers), _ = step_of(objective)(PARAMS, BUFFERS, X, Y)
    grads, (losses, buffers), _ = run(PARAMS, BUFFERS, X, Y)
    assert {leaf.dtype for leaf in _tree.leaves((grads, losses))} == {torch.float32}
    a, b = _tree.ravel(grads), _tree.ravel(want)
    assert (a - b).norm() < 0.05 * b.norm()
    assert not torch.equal(a, b), "rounded inside"
    for name, statistic in want_buffers.items():
        assert buffers[name].dtype == statistic.dtype
        torch.testing.assert_close(buffers[name], statistic, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rule", [jd.upgrad(), jd.scalarizers.mean()], ids=repr)
def test_microbatches_hand_statistics_on(dtype, rule):
    fn = objective if dtype is None else jd.cast_floating(objective, dtype)
    parts = jd.accumulate(fn, 4, has_aux=True, carry_aux=1)
    _, (_, buffers), _ = jd.grad_and_value(parts, rule, has_aux=True)(None, PARAMS, BUFFERS, X, Y)
    model = network()
    for x in X.chunk(4):
        model(x)
    for name, statistic in model.named_buffers():
        assert buffers[name].shape == statistic.shape
        tol = 1e-6 if dtype is None else 0.02
        torch.testing.assert_close(buffers[name], statistic, rtol=tol, atol=tol)
    assert buffers["1.num_batches_tracked"] == 4


def test_a_scaler_with_a_loop_of_backward():
    model, twin = network(), copy.deepcopy(network())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    scaler, state = torch.amp.GradScaler("cpu", init_scale=2.0**10), None
    for _ in range(3):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            with torch.autocast("cpu", torch.float16):
                outputs = net(X)
            losses, optimizer_step = losses_of(outputs, Y), optimizer.step
            optimizer.zero_grad()
            if net is model:
                state = jd.interop.backward_(losses, net, jd.upgrad(), state, scaler=scaler)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
            else:
                jd.interop.backward_(losses, net, jd.upgrad())
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer_step()
    assert_trees_close(model.state_dict(), twin.state_dict(), rtol=1e-2, atol=1e-2)
    assert model[1].running_mean.dtype == torch.float32
    assert scaler.get_scale() == pytest.approx(2.0**10), "no step was skipped"


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_scale_changes_no_method(name):
    method = METHODS[name]

    def five(params, x):
        return (x @ params["w"]).tanh().square().mean(0) + 0.1

    params = {"w": torch.randn(3, 5, dtype=torch.float64, generator=GENERATOR)}
    x = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)
    rule, key = method.make(5), key_for(method)
    scaled = jd.loss_scale.scaled(five, jd.loss_scale.init(2.0**12))
    state = other = jd.init_state(rule, five, params, x, key=key)
    for _ in range(2):
        want, state = jd.grad(five, rule)(state, params, x)
        got, other = jd.grad(scaled, rule)(other, params, x)
        assert_trees_close(got, want, rtol=1e-9, atol=1e-12)
        assert_trees_close(other, state, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_overflows_changes_nothing(name):
    method = METHODS[name]
    rule = method.make(5)
    shifts = torch.linspace(1, 2, 5)
    half = jd.cast_floating(
        lambda w, x: ((x @ w)[:, None] + shifts.to(x.dtype)).square().mean(0), torch.float16
    )
    w, x = torch.ones(3), torch.linspace(0.5, 1, 12).reshape(4, 3)
    scale = jd.loss_scale.init(2.0**30)
    state = jd.init_state(rule, half, w, x, key=key_for(method))
    grads, after = jd.grad(jd.loss_scale.scaled(half, scale), rule)(state, w, x)
    scale = jd.loss_scale.update(scale, grads)
    assert not scale.finite
    kept = jd.loss_scale.keep(scale, (w - grads, after), (w, state))
    assert_trees_close(kept, (w, state), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, 0.0])
def test_a_loss_scale_comes_back_after_any_number_of_steps(bad):
    half = jd.cast_floating(lambda w: (2.0**-13 * w).square().sum(), torch.float16)
    scale, fast = jd.loss_scale.init(), {"growth_interval": 1}
    for _ in range(300):
        scale = jd.loss_scale.update(scale, torch.tensor(bad), **fast)
    assert 0 < scale.scale < torch.inf
    slopes = []
    for _ in range(150):
        slope = jd.grad(jd.loss_scale.scaled(half, scale), jd.mean())(None, torch.ones(1))[0]
        scale = jd.loss_scale.update(scale, slope, **fast)
        slopes += [slope] if scale.finite else []
    torch.testing.assert_close(slopes[-1], torch.full((1,), 2.0**-25), rtol=1e-2, atol=0)


def attended(params, x):
    """Return losses of attention with scores that are learned, by position."""
    q, k, v = (torch.nn.functional.linear(x, w) for w in params[:3])
    bias = params[3].expand(len(x), -1, -1)
    h = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return h.square().mean((1, 2))


def attended_alone(params, x):
    return attended(params, x.unsqueeze(0)).squeeze(0)


ATTENTION = {
    "by rows": (attended, {}),
    "one by one": (attended, {"chunk_size": 1}),
    "by layers": (jd.instancewise(attended), {}),
    "per example": (jd.per_example(attended_alone), {}),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_with_learned_scores_under_autocast(name, compiled):
    # Its own generator: how far rounding carries must not depend on which tests ran before.
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4), (4, 4), (4, 4), (5, 5)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    x = torch.randn(3, 5, 4, generator=generator)
    objective, options = ATTENTION[name]
    run = jd.gramian(objective, **options)
    want = jd.gramian(attended)(params, x)
    with torch.autocast("cpu", torch.bfloat16):
        run(params, x)
        run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
        found = run(params, x)
    torch._dynamo.reset()
    assert found.dtype == torch.float32
    assert 0 < (found - want).abs().max() < 0.05 * want.abs().max()
