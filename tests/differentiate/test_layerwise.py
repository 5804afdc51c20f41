"""Layer by layer, without a Jacobian: equal to explicit rows for every way to use a parameter."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

import torchjd_func as jd
from tests.programs import by_loops
from tests.zoo import ZOO, B, Specimen

NAMES = sorted(ZOO)
WEIGHTS = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)


def build(name: str):
    """Return the loss of a batch, parameters and inputs of a specimen."""
    torch.manual_seed(0)
    specimen = ZOO[name]
    net = specimen.make().double()
    params = {key: value.detach() for key, value in net.named_parameters()}

    def losses(params, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,)).sin().flatten(1).sum(1)

    return specimen, losses, params, inputs(specimen)


def inputs(specimen: Specimen) -> Tensor:
    """Return a batch."""
    if specimen.tokens:
        return torch.randint(0, specimen.tokens, specimen.shape)
    return torch.randn(specimen.shape, dtype=torch.float64)


def explicit_rows(losses, params, x: Tensor) -> dict[str, Tensor]:
    """Return the Jacobian by one plain backward pass for each loss: the oracle."""
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    values = losses(leaves, x)
    rows = [
        torch.autograd.grad(
            value,
            list(leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for value in values
    ]
    return dict(zip(leaves, map(torch.stack, zip(*rows, strict=True)), strict=True))


def gramian_of(rows: dict[str, Tensor]) -> Tensor:
    """Return the Gramian of explicit rows."""
    flat = torch.cat([row.reshape(B, -1) for row in rows.values()], 1)
    return flat @ flat.mT


def close(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Compare relative to the size of what was added up."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-10 * (scale.abs().max() + 1e-2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("instance-wise", name) for name in NAMES]
    + [("general", name) for name in NAMES if ZOO[name].vmaps],
)
def test_gramian_and_pullback_equal_explicit_rows(name: str, kind: str) -> None:
    _, losses, params, x = build(name)
    rows = explicit_rows(losses, params, x)
    objective = jd.instancewise(losses) if kind == "instance-wise" else losses
    values, gramian, vjp_fn = jd.gramian_vjp(objective, params, x, route="layerwise")
    expected = gramian_of(rows)
    close(values, losses(params, x), values)
    close(gramian, expected, expected)
    grads = vjp_fn(WEIGHTS)
    for key, row in rows.items():
        close(grads[key], torch.tensordot(WEIGHTS, row, dims=1), row)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_an_instancewise_objective_equal_explicit_rows(name: str) -> None:
    _, losses, params, x = build(name)
    jac = jd.jac(jd.instancewise(losses))(params, x)
    for key, row in explicit_rows(losses, params, x).items():
        close(jac[key], row, row)


@pytest.mark.parametrize("name", [name for name in NAMES if ZOO[name].vmaps])
def test_one_example_at_a_time_equals_explicit_rows(name: str) -> None:
    _, losses, params, x = build(name)
    objective = jd.per_example(lambda params, x: losses(params, x.unsqueeze(0)).squeeze(0))
    rows = explicit_rows(losses, params, x)
    _, gramian, vjp_fn = jd.gramian_vjp(objective, params, x)
    expected = gramian_of(rows)
    close(gramian, expected, expected)
    for key, grads in vjp_fn(WEIGHTS).items():
        close(grads, torch.tensordot(WEIGHTS, rows[key], dims=1), rows[key])


# Compiling hides `_weight_norm`, so that the plan is not the graph's (torch 2.13)
HIDDEN_IN_GRAPHS = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("An instance-wise objective is compiled without a plan", "There is a performance")
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=HIDDEN_IN_GRAPHS if name == "weight norm" else ()) for name in NAMES],
)
def test_compiled_equals_eager(name: str) -> None:
    compiled_equals_eager(name)


@pytest.mark.parametrize("name", ["conv2d", "transformer", "time first, flattened"])
def test_compiled_with_a_default_device(name: str) -> None:
    with torch.device("cpu"):  # a mode for functions, within which torch 2.13 traces fewer methods
        compiled_equals_eager(name)


def compiled_equals_eager(name: str) -> None:
    """Check a graph that replays a plan, against the eager call and loops."""
    _, losses, params, x = build(name)
    objective = jd.instancewise(losses)

    def both(params, x: Tensor):
        _, gramian, vjp_fn = jd.gramian_vjp(objective, params, x)
        return gramian, vjp_fn(WEIGHTS)

    expected, expected_grads = both(params, x)  # plans, and the graph replays it without a warning
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    gramian, grads = compiled(params, x)
    close(gramian, expected, expected)
    rows = explicit_rows(losses, params, x)
    for key, grad in grads.items():
        close(grad, expected_grads[key], rows[key])


@pytest.mark.parametrize(("chunk_size", "passes"), [(None, 1), (4, 2), (1, 5)])
def test_chunk_size_bounds_how_many_losses_share_a_pass_to_leaves_without_rules(chunk_size, passes):
    calls = []

    def losses(params, x):
        scales = torch.linalg.svdvals(params["v"])
        if scales.requires_grad:
            scales.register_hook(lambda grad: calls.append(grad))
        return (scales * x @ params["w"]).tanh().sum(1)

    params = {"v": torch.rand(3, 3, dtype=torch.float64), "w": torch.rand(3, 2).double()}
    x = torch.rand(5, 3, dtype=torch.float64)
    gramian = jd.gramian(jd.instancewise(losses), chunk_size=chunk_size)
    gramian(params, x)
    calls.clear()
    found = gramian(params, x)
    assert len(calls) == passes
    torch.testing.assert_close(found, jd.gramian(losses, route="jacobian")(params, x))


def penalty(params: list[Tensor], x: Tensor) -> Tensor:
    """Return losses of a gradient by activations, by plain autograd."""
    h = torch.tanh(x @ params[0])
    loss = (h @ params[1]).square().sum()
    (inner,) = torch.autograd.grad(loss, [h], create_graph=True)
    return torch.stack([inner.square().sum(), loss])


def tangent(params: list[Tensor], x: Tensor) -> Any:
    """Return losses of a derivative along the inputs, by dual numbers."""
    with forward_ad.dual_level():
        out = torch.tanh(forward_ad.make_dual(x, 2 * x) @ params[0]) @ params[1]
        value, along = cast(Any, forward_ad.unpack_dual(out))
        return torch.stack([along.square().sum(), value.sum()])


def adapted(params: list[Tensor], x: Tensor) -> Tensor:
    """Return losses after a step of gradient descent on one of them."""
    loss = (torch.tanh(x @ params[0]) @ params[1]).square().mean()
    steps = torch.autograd.grad(loss, params, create_graph=True)
    moved = [p - 0.1 * step for p, step in zip(params, steps, strict=True)]
    return torch.stack([loss, (torch.tanh(x @ moved[0]) @ moved[1]).cos().mean()])


@pytest.mark.parametrize("fn", [penalty, tangent, adapted])
@pytest.mark.parametrize("route", ["layerwise", "auto"])
def test_derivatives_inside_an_objective(fn, route):
    """What they make of parameters comes by no operation that anybody sees."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 5), (5,), (3, 4))
    *params, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    rows = by_loops(fn, params, x)
    got = jd.gramian(fn, route=route)(params, x)
    torch.testing.assert_close(got, rows @ rows.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [True, False])
def test_attention_with_weights_for_each_input(packed):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 4), (4, 4), (4, 4), (4, 4), (3, 5, 4))
    *params, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    ignored = torch.ones(12, 4).double() if packed else torch.empty(0).double()

    def fn(params: list[Tensor], x: Tensor) -> Tensor:
        q, k, v, out = params
        given: Any = (*[x.transpose(0, 1)] * 3, 4, 2, ignored, *[None] * 3, False, 0.0, out, None)
        weights: Any = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
        attend = F.multi_head_attention_forward
        mixed, _ = attend(*given, use_separate_proj_weight=True, **weights)
        return mixed.square().sum((0, 2))

    rows = by_loops(fn, params, x)
    got = jd.gramian(jd.instancewise(fn))(params, x)
    torch.testing.assert_close(got, rows @ rows.T, rtol=1e-9, atol=1e-9)
