"""Derivatives of Gramians, by every route: what kernels keep of an input depends on it, too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchjd_func as jd
from tests.helpers import compiled

X = torch.linspace(-9, 20, 96, dtype=torch.float64).sin().reshape(3, 2, 4, 4)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
PARAMS = (
    torch.linspace(0, 9, 24, dtype=torch.float64).cos().reshape(3, 2, 2, 2),
    torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64),
    torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64),
)
STEPS = 1e-5, -1e-5
weight_norm: Callable[..., Tensor] = vars(torch)["_weight_norm"]
Params = tuple[Tensor, ...]
NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "layer": lambda h, g, b: F.layer_norm(h.movedim(1, -1), (3,), g, b),
    "layer, scaled alone": lambda h, g, b: F.layer_norm(h.movedim(1, -1), (3,), weight=g) + b,
    "layer, shifted alone": lambda h, g, b: F.layer_norm(h.movedim(1, -1) * g, (3,), bias=b),
    "group, shifted alone": lambda h, g, b: F.group_norm(h * g[:, None, None], 1, bias=b),
    "instance": lambda h, g, b: F.instance_norm(h, weight=g, bias=b),
    "group": lambda h, g, b: F.group_norm(h, 1, g, b),
    "root mean square": lambda h, g, b: F.rms_norm(h.movedim(1, -1), (3,), g) + b,
    "batch": lambda h, g, b: F.batch_norm(h, None, None, g, b, training=True),
    "batch, evaluating": lambda h, g, b: F.batch_norm(h, X[0, 0, 0, :3], X[1, 0, 1, :3] ** 2, g, b),
}
ROUTES = [("layerwise", None), ("jacobian", None), ("jacobian", 1), ("product", None)]


def _weight_normalised(params: Params, x: Tensor) -> Tensor:
    v, g, b = params
    return F.conv2d(x, weight_norm(v, g[:, None, None, None], 0), b).sin().flatten(1).sum(1)


def _of(name: str) -> Callable[[Params, Tensor], Tensor]:
    if name == "weight":
        return _weight_normalised

    def losses(params: Params, x: Tensor) -> Tensor:
        w, g, b = params
        return NORMS[name](F.conv2d(x, w), g, b).sin().flatten(1).sum(1)

    return losses


def _product(losses: Callable[..., Tensor], *route: object) -> Callable[[Params], Tensor]:
    """Return a function of the parameters that reads their Gramian."""
    options = dict(zip(("route", "chunk_size"), route, strict=False))

    def read(params: Params) -> Tensor:
        return WEIGHTS @ jd.gramian(losses, **options)(params, X) @ WEIGHTS  # pyright: ignore

    return read


def _check(read: Callable[[Params], Tensor], grads: Params) -> None:
    """Hold derivatives against finite differences."""
    ways = [torch.linspace(1, 3, p.numel(), dtype=p.dtype).cos().reshape(p.shape) for p in PARAMS]
    ends = [
        read(tuple(p + t * w for p, w in zip(PARAMS, ways, strict=True))) for t in (1e-5, -1e-5)
    ]
    slope = sum((g * w).sum() for g, w in zip(grads, ways, strict=True))
    torch.testing.assert_close(
        slope, (ends[0] - ends[1]) / (STEPS[0] - STEPS[1]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*NORMS, "weight"])
def test_derivatives_through_norms(name: str, route: tuple[str, int | None]) -> None:
    losses = _of(name) if name == "batch" else jd.instancewise(_of(name))
    read = _product(losses, *route)
    _check(read, torch.func.grad(read)(PARAMS))


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("layout", ["batched", "per example", "shared"])
def test_derivatives_of_compiled_gramians(layout: str, route: tuple[str, int | None]) -> None:
    losses = _of("batch" if layout == "shared" else "layer")
    if layout == "batched":
        losses = jd.instancewise(losses)
    elif layout == "per example":
        one = losses
        losses = jd.per_example(lambda params, x: one(params, x[None]).sum())
    read = _product(losses, *route)
    value = read(PARAMS)
    torch.testing.assert_close(compiled(read)[0](PARAMS), value)
    _check(read, compiled(torch.func.grad(read))[0](PARAMS))


@pytest.mark.parametrize("name", ["layer", "instance", "batch", "group", "root mean square"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_derivatives_of_what_is_pushed_forward_through_norms(name: str, in_graph: bool) -> None:
    inside = _of(name)

    def losses(params: Params, x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: inside(params, x), (x,), (x.cos(),))[1]

    objective = losses if name == "batch" else jd.instancewise(losses)

    def step(params: Params) -> Params:
        return jd.grad(objective, jd.constant(WEIGHTS))(None, params, X)[0]

    grads = step(PARAMS)
    _check(
        lambda params: WEIGHTS @ losses(params, X), compiled(step)[0](PARAMS) if in_graph else grads
    )


def test_running_statistics_move_where_derivatives_are_nested() -> None:
    def losses(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        w, g, b = params
        mean, var = torch.zeros_like(g), torch.ones_like(g)
        out = F.batch_norm(F.conv2d(x, w), mean, var, g, b, training=True)
        return out.sin().flatten(1).sum(1), mean

    def read(params: Params) -> tuple[Tensor, Tensor]:
        gramian, mean = jd.gramian(losses, has_aux=True)(params, X)
        return gramian.sum(), mean

    _, mean = torch.func.grad(read, has_aux=True)(PARAMS)
    torch.testing.assert_close(mean, 0.1 * F.conv2d(X, PARAMS[0]).mean((0, 2, 3)))
