"""Hooks on tensors, eager and in graphs: they count, or they are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchjd_func as jd

UNPLANNED = "An instance-wise objective is compiled without a plan"
NO_PLAN = pytest.mark.filterwarnings(f"ignore:{UNPLANNED}")


def layer(w: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w).tanh()


def on_features(w, x, hooked=True):
    x = layer(w[0], x)
    if hooked:
        x.register_hook(lambda grad: 3 * grad)
    return layer(w[2], layer(w[1], x)).square().sum(-1)


def on_weights(w, x, hooked=True):
    weight = w[1] * 1
    if hooked:
        weight.register_hook(lambda grad: -grad.clamp(-0.1, 0.1))
    return layer(w[2], layer(weight, layer(w[0], x))).square().sum(-1)


def on_several(w, x, hooked=True):
    for weight in w:
        x = layer(weight, x)
        if hooked:
            x.register_hook(lambda grad: grad / 2)
    return x.square().sum(-1)


KINDS = {"features": on_features, "weights": on_weights, "several": on_several}


def point():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, 4, 4, dtype=torch.float64, generator=generator)
    return list(draws[:3]), draws[3]


def by_loops(fn, w, x, *args):
    """Return the Gramian of rows by plain autograd."""
    w = [leaf.clone().requires_grad_() for leaf in w]
    losses = fn(w, x, *args)
    rows = [torch.autograd.grad(loss, w, retain_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    return flat @ flat.mT


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_count(kind):
    w, x = point()
    found = jd.gramian(jd.instancewise(KINDS[kind]))(w, x)
    torch.testing.assert_close(found, by_loops(KINDS[kind], w, x), rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 and 2.12 trace other operations: rows are taken"
)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_were_planned_count_in_a_graph_without_a_warning(kind):
    w, x = point()
    gramian = jd.gramian(jd.instancewise(KINDS[kind]))
    gramian(w, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compiled(gramian)(w, x)
    torch.testing.assert_close(found, by_loops(KINDS[kind], w, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_notices_hooks_that_were_not_planned(kind):
    w, x = point()
    gramian = jd.gramian(jd.instancewise(KINDS[kind]))
    gramian(w, x, False)
    with pytest.warns(UserWarning, match=UNPLANNED):
        found = compiled(gramian)(w, x, True)
    torch.testing.assert_close(found, by_loops(KINDS[kind], w, x, True), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_does_without_hooks_that_were_planned(kind):
    w, x = point()
    gramian = jd.gramian(jd.instancewise(KINDS[kind]))
    gramian(w, x, True)
    found = compiled(gramian)(w, x, False)
    torch.testing.assert_close(found, by_loops(KINDS[kind], w, x, False), rtol=1e-10, atol=1e-12)


@NO_PLAN
@pytest.mark.parametrize("route", ["auto", "jacobian"])
def test_a_graph_of_examples_refuses_hooks(route):
    w, x = point()
    objective = jd.per_example(lambda w, x: on_weights(w, x, hooked=w[1].requires_grad))
    gramian = jd.gramian(objective, route=route)
    assert gramian(w, x).isfinite().all()
    with pytest.raises(Exception, match="must register no hooks"):
        compiled(gramian)(w, x)
