"""The layer-by-layer route under and over other transforms, and where claims are wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import torchjd_func as jd
from tests.differentiate.test_layerwise import build
from torchjd_func import _tree

B = 4


def mlp(seed: int = 0):
    """Return the losses of a small network, its parameters and a batch, in float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    params = {key: value.detach() for key, value in net.named_parameters()}

    def losses(params, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,)).sin().sum(1)

    return losses, params, torch.randn(B, 5, dtype=torch.float64)


def both(losses, *args, **options):
    """Return the results of the layer-by-layer route and of explicit rows."""
    routes = ("layerwise", "jacobian")
    return [jd.gramian(jd.instancewise(losses), route=m, **options)(*args) for m in routes]


def test_maps_over_seeds() -> None:
    losses, params, x = mlp()
    several = {key: torch.stack([value, value + 1, -value]) for key, value in params.items()}
    mapped = vmap(jd.gramian(jd.instancewise(losses)), in_dims=(0, None))(several, x)
    for k in range(3):
        one, _ = both(losses, {key: value[k] for key, value in several.items()}, x)
        torch.testing.assert_close(mapped[k], one, rtol=1e-10, atol=1e-12)


def test_can_be_differentiated() -> None:
    losses, params, x = mlp()

    def spread(params, route: str) -> Tensor:
        return jd.gramian(jd.instancewise(losses), route=route)(params, x).square().sum()

    first, second = (grad(spread)(params, route) for route in ("layerwise", "jacobian"))
    for key in params:
        torch.testing.assert_close(first[key], second[key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("calls", [1, 2])
def test_draws_dropout_once_for_each_step(calls: int) -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double().train()
    params = {key: value.detach() for key, value in net.named_parameters()}
    x = torch.randn(B, 5, dtype=torch.float64)
    found = []
    for route in ("layerwise", "jacobian"):
        objective = jd.instancewise(lambda p, x: functional_call(net, p, (x,)).square().sum(1))
        torch.manual_seed(1)
        found.append([jd.gramian(objective, route=route)(params, x) for _ in range(calls)][-1])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["parameters", "autocast"])
def test_half_precision_gives_a_float32_gramian(kind: str) -> None:
    losses, params, x = mlp()
    exact, _ = both(losses, params, x)
    single = {key: value.float() for key, value in params.items()}

    def mixed(params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(params, x).float()

    if kind == "parameters":
        half = {key: value.bfloat16() for key, value in single.items()}
        gramian = jd.gramian(jd.instancewise(losses))(half, x.bfloat16())
    else:
        gramian = jd.gramian(jd.instancewise(mixed))(single, x.float())
    assert gramian.dtype == torch.float32
    torch.testing.assert_close(gramian.double(), exact, rtol=0.1, atol=0.05 * exact.max().item())


def test_crosses_two_batches_of_different_size() -> None:
    losses, params, x = mlp()
    y = torch.randn(7, 5, dtype=torch.float64)
    found = [
        jd.cross_gramian(jd.instancewise(losses), route=route)(params, (x,), (y,))
        for route in ("layerwise", "jacobian")
    ]
    assert found[0].shape == (B, 7)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_serves_groups_rows_aux_and_several_arguments() -> None:
    losses, params, x = mlp()

    def with_scale(params, scale: Tensor, x: Tensor):
        values = losses(params, x) * scale.exp()
        return values, {"mean": values.mean(), "shape": x.shape}

    scale = torch.tensor(0.3, dtype=torch.float64)
    rules = (jd.upgrad(), jd.grouped(jd.mgda(), jd.by_tensor), jd.trimmed_mean(1))
    for rule in rules:
        found = []
        for fn in (jd.instancewise(with_scale), with_scale):
            step = jd.grad_and_value(fn, rule, argnums=(0, 1), has_aux=True)
            found.append(step(None, params, scale, x))
        (first, (values, aux), _), (second, (expected, expected_aux), _) = found
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(aux["mean"], expected_aux["mean"], rtol=1e-12, atol=0)
        assert aux["shape"] == x.shape
        for one, other in zip(_tree.leaves(first), _tree.leaves(second), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_serves_the_trunk_of_a_multitask_objective() -> None:
    _, _, x = mlp()
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    shared = {key: value.detach() for key, value in net.named_parameters()}
    heads = {
        name: (lambda p, z, batch, k=k: ((z @ p).sum(1) - k).square().mean())
        for k, name in enumerate("abc")
    }
    head_params = {name: torch.randn(6, 2, dtype=torch.float64) for name in heads}
    objective = jd.multitask(lambda p, x: functional_call(net, p, (x,)), heads)
    found = [
        jd.grad_and_value(objective, jd.upgrad(), route=route)(None, (shared, head_params), x)
        for route in ("layerwise", "jacobian")
    ]
    pairs = zip(_tree.leaves(found[0][0]), _tree.leaves(found[1][0]), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def residual(params, x: Tensor) -> Tensor:
    """Return the residual of a differential equation at one point."""

    def u(params, x: Tensor) -> Tensor:
        return (torch.tanh(x[None] @ params["a"]) @ params["b"])[0, 0]

    return grad(u, 1)(params, x).sum() + u(params, x)


PHYSICS = {
    "general": lambda p, x: torch.stack(
        [vmap(residual, (None, 0))(p, x).square().mean(), residual(p, x[0]).square()]
    ),
    "instance-wise": jd.instancewise(lambda p, x: vmap(residual, (None, 0))(p, x).square()),
    "per example": jd.per_example(lambda p, x: residual(p, x).square()),
    "a map inside": jd.instancewise(
        lambda p, x: vmap(lambda row: F.linear(row, p["a"].t()))(x).tanh().sum(1)
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", sorted(PHYSICS))
def test_objectives_that_differentiate_inside(name: str, compiled: bool) -> None:
    torch.manual_seed(0)
    params = {
        "a": torch.randn(1, 8, dtype=torch.float64),
        "b": torch.randn(8, 1, dtype=torch.float64),
    }
    x = torch.randn(B, 1, dtype=torch.float64)
    jac = torch.func.jacrev(lambda p: PHYSICS[name](p, x))(params)
    flat = torch.cat([leaf.flatten(1) for leaf in jac.values()], 1)
    found = jd.gramian(PHYSICS[name], route="layerwise")
    found(params, x)
    torch._dynamo.reset()
    run = torch.compile(found, fullgraph=True, backend="aot_eager") if compiled else found
    torch.testing.assert_close(run(params, x), flat @ flat.mT, rtol=1e-9, atol=1e-10)


def test_a_graph_without_a_plan_is_right_and_says_so() -> None:
    table = torch.randn(6, 3, dtype=torch.float64)
    index = torch.randint(0, 6, (B, 2))
    objective = jd.instancewise(lambda w, i: (F.embedding(i, w).tanh() @ w.T).sin().sum((1, 2)))
    expected = jd.gramian(objective, route="jacobian")(table, index)
    torch._dynamo.reset()
    compiled = torch.compile(jd.gramian(objective), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="without a plan that was proven"):
        got = compiled(table, index)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(jd.gramian(objective)(table, index), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("overwrite", ["itself", "a view", "by index", "as a layer"])
@pytest.mark.parametrize("route", ["layerwise", "jacobian"])
def test_an_input_that_is_overwritten_later_is_an_error_on_every_route(
    overwrite: str, route: str
) -> None:
    _, params, x = mlp()

    def losses(params, x: Tensor) -> Tensor:
        h = F.linear(x, params["0.weight"]).sin()
        kept = F.linear(h, params["2.weight"])
        if overwrite == "itself":
            h.mul_(2)
        elif overwrite == "a view":
            h.t().add_(1.0)
        elif overwrite == "by index":
            h[:, 0] = 3.0
        else:
            F.relu(h, inplace=True)
        return kept.sin().sum(1) + h.sum(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        jd.gramian(jd.instancewise(losses), route=route)(params, x)


def test_plans_anew_when_the_objective_changes_its_ways() -> None:
    losses, params, x = mlp()
    way = ["first"]

    def changing(params, x: Tensor) -> Tensor:
        values = losses(params, x)
        return values if way[0] == "first" else values + (x @ params["0.weight"].t()).sum(1)

    objective = jd.instancewise(changing)
    for name in ("first", "second", "first"):
        way[0] = name
        expected = jd.gramian(changing)(params, x)
        torch.testing.assert_close(jd.gramian(objective)(params, x), expected, rtol=1e-9, atol=0)


def test_takes_a_batch_by_closure_and_arrays_without_examples_first() -> None:
    losses, params, x = mlp()
    expected = jd.gramian(losses)(params, x)
    closed = jd.gramian(jd.instancewise(lambda params: losses(params, x)))(params)
    torch.testing.assert_close(closed, expected, rtol=1e-10, atol=1e-12)
    offset = torch.zeros(5, dtype=torch.float64)
    late = jd.instancewise(lambda params, offset, x: losses(params, x + offset))
    torch.testing.assert_close(jd.gramian(late)(params, offset, x), expected, rtol=1e-10, atol=0)


def test_refuses_batch_normalisation_over_examples() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False))
    params = {key: value.detach() for key, value in net.named_parameters()}
    objective = jd.instancewise(lambda p, x: functional_call(net, p, (x,)).sum(1))
    with pytest.raises(ValueError, match="must treat each example by itself, got batch norm"):
        jd.gramian(objective)(params, torch.randn(B, 5))


def test_checks_the_claim_that_examples_are_independent() -> None:
    losses, params, x = mlp()
    jd.check_instancewise(jd.instancewise(losses), params, x)
    centred = jd.instancewise(lambda p, x: losses(p, x) - losses(p, x).mean())
    with pytest.raises(ValueError, match=r"behind linear \(parameter '0\.bias'\)"):
        jd.check_instancewise(centred, params, x)
    with pytest.raises(TypeError, match="`fn` must be instance-wise"):
        jd.check_instancewise(losses, params, x)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("n_examples", [1, 4, 100])
def test_checks_the_claim_where_an_example_has_several_losses(mixed: bool, n_examples: int) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    params = {key: value.detach() for key, value in net.named_parameters()}

    @jd.instancewise
    def losses(p, x):
        outputs = functional_call(net, p, (x,)).square()
        return outputs - outputs.mean(0) if mixed else outputs

    check = partial(jd.check_instancewise, losses, params, torch.randn(B, 5), n_examples=n_examples)
    if not mixed:
        return check()
    with pytest.raises(ValueError, match="depend on their own example alone"):
        check()


@pytest.mark.parametrize("name", ["transformer", "conv2d", "time first", "unused parameter"])
def test_networks_of_independent_examples_pass_the_check(name: str) -> None:
    _, losses, params, x = build(name)
    jd.check_instancewise(jd.instancewise(losses), params, x)


def test_explains_each_parameter() -> None:
    _, losses, params, x = build("transformer")
    found = {
        line.path: line for line in jd.explain_gramian(jd.instancewise(losses), params, x).leaves
    }
    assert found["words.weight"].rule == "embedding, linear"
    assert found["layer.linear1.weight"].contraction in ("factors", "rows")
    _, losses, params, x = build("no rule")
    lines = {
        line.path: line for line in jd.explain_gramian(jd.instancewise(losses), params, x).leaves
    }
    assert lines["p"].rule == "no rule for cosine_similarity"
    assert lines["p"].contraction == "m backward passes"
    assert lines["p"].size == B * 6 * 8
    _, losses, params, x = build("unused parameter")
    assert "not used" in str(jd.explain_gramian(jd.instancewise(losses), params, x))


def test_microbatches_may_be_differentiated_layer_by_layer() -> None:
    losses, params, x = mlp()
    objective = jd.accumulate(lambda p, x: losses(p, x).mean(), 2)
    want = jd.gramian(objective)(params, x)
    torch.testing.assert_close(jd.gramian(objective, route="layerwise")(params, x), want)


COMPILED = {
    "batched": lambda fn: jd.instancewise(lambda p, x: fn(x, p).sum(1)),
    "mapped": lambda fn: jd.per_example(lambda p, x: fn(x, p).sum()),
    "without examples": lambda fn: lambda p, x: fn(x, p).sum(0),
}


@pytest.mark.parametrize("layout", COMPILED)
def test_functions_that_were_compiled_by_themselves_are_seen_through(layout: str) -> None:
    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    fast = torch.compile(plain, backend="eager")
    objectives = [COMPILED[layout](fn) for fn in (fast, plain)]
    for seed in (0, 1):
        args = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)), torch.ones(B, 3)
        found, expected = (jd.gramian(fn, route="layerwise")(*args) for fn in objectives)
        torch.testing.assert_close(found, expected)
