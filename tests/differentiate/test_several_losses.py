"""Several losses for each example: `(b, k)`."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import torchjd_func as jd
from tests.helpers import assert_trees_close

B, ROUTES = 5, ("auto", "layerwise", "jacobian", "product")


class Tokens(nn.Module):
    """Scores of the next token: an embedding, attention, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.queries, self.keys = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, x):
        h = self.embedding(x)
        attention = (self.queries(h) @ self.keys(h).mT).softmax(-1)
        return self.head(self.norm(h + attention @ h))


def images():
    """A convolution, and a square error for each output."""
    parts = (nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    apply, params, _ = jd.functionalize(nn.Sequential(*parts).double())

    def fn(params, x, y):
        return (apply(params, {}, x)[0] - y).square()

    return fn, params, (torch.randn(B, 2, 4).double(), torch.randn(B, 3).double())


def tokens():
    """A loss for each token."""
    apply, params, _ = jd.functionalize(Tokens().double())

    def fn(params, x):
        scores, _ = apply(params, {}, x[:, :-1])
        return cross_entropy(scores.mT, x[:, 1:], reduction="none")

    return fn, params, (torch.randint(7, (B, 4)),)


def unknown():
    """A parameter without a rule beside one with a rule."""
    params = {"w": torch.randn(3, 2).double(), "u": torch.randn(3).double()}

    def fn(params, x):
        return (x @ params["w"]) * (x * params["u"].cumsum(0)).sum(1, keepdim=True)

    return fn, params, (torch.randn(B, 3).double(),)


CASES = {"images": images, "tokens": tokens, "unknown": unknown}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    fn, params, args = CASES[request.param]()
    return jd.instancewise(fn), lambda *given: fn(*given).flatten(), params, args


@pytest.mark.parametrize("route", ROUTES)
def test_gramian(case, route):
    objective, flat, params, args = case
    got, losses = jd.gramian_and_value(objective, route=route)(params, *args)
    torch.testing.assert_close(got, jd.gramian(flat, route="jacobian")(params, *args))
    torch.testing.assert_close(losses, objective.fn(params, *args))


def test_rows_norms_and_pullback(case):
    objective, flat, params, args = case
    rows = jd.jac(flat)(params, *args)
    assert_trees_close(jd.jac(objective)(params, *args), rows)
    norms = jd.gramian(flat)(params, *args).diagonal().sqrt()
    torch.testing.assert_close(jd.row_norms(objective)(params, *args), norms)
    losses, _, pull = jd.gramian_vjp(objective, params, *args)
    weights = torch.randn(losses.numel()).double()
    want = torch.func.vjp(lambda p: flat(p, *args), params)[1](weights)[0]
    assert_trees_close(pull(weights), want)


def test_one_example_alone(case):
    objective, flat, params, args = case
    args = tuple(x[:1] for x in args)
    got = jd.gramian(objective)(params, *args)  # without a warning, which would be an error
    torch.testing.assert_close(got, jd.gramian(flat)(params, *args))


@pytest.mark.parametrize("masked", [False, True])
def test_direction(case, masked):
    objective, flat, params, args = case
    rule, count = jd.upgrad(), objective.fn(params, *args).numel()
    present = (torch.arange(count) % 3 > 0) & (torch.arange(count) > 3) if masked else None
    got, _ = jd.grad(objective, rule)(None, params, *args, present=present)
    want, _ = jd.grad(flat, rule, route="jacobian")(None, params, *args, present=present)
    assert_trees_close(got, want, rtol=1e-6, atol=1e-9)


def test_compiled_as_planned(case):
    objective, flat, params, args = case
    jd.init_state(jd.mean(), objective, params, *args)
    compiled = torch.compile(jd.gramian(objective), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, *args), jd.gramian(flat)(params, *args))


def test_losses_that_mix_examples_take_rows():
    fn, params, args = images()

    def mixed(*given):
        losses = fn(*given)
        return losses - losses.mean(0)

    with pytest.warns(UserWarning, match="losses depend on other examples"):
        got = jd.gramian(jd.instancewise(mixed))(params, *args)
    want = jd.gramian(lambda *given: mixed(*given).flatten())(params, *args)
    torch.testing.assert_close(got, want)


def test_more_axes_are_refused():
    fn, params, args = images()
    with pytest.raises(ValueError, match=r"must have shape \(b,\) or \(b, k\).*\(1, 5, 3\)"):
        jd.gramian(jd.instancewise(lambda *given: fn(*given)[None]))(params, *args)


@pytest.mark.parametrize("route", ROUTES)
def test_the_loss_of_one_example_is_one(route):
    fn, params, args = images()

    def one(params, x, y):
        return fn(params, x[None], y[None])[0]

    with pytest.raises(ValueError, match=r"must have shape \((b,)?\), got"):
        jd.gramian(jd.per_example(one), route=route)(params, *args)


PARAMS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 1.0])}


def test_a_loss_that_is_a_constant_is_named():
    def losses(params):
        return {"kept": (params["a"] * params["b"]).sum(), "lost": params["a"].detach().sum()}

    for rule in (jd.mean(), jd.scalarizers.mean()):
        step = jd.grad(losses, rule)
        with pytest.warns(UserWarning, match=r"Losses \['lost'\] are constants"):
            step(None, PARAMS)
        step(None, PARAMS, present={"kept": True, "lost": False})


def test_a_loss_of_other_parameters_than_those_that_weights_come_from_is_no_constant():
    def losses(params):
        return {"both": (params["a"] * params["b"]).sum(), "other": params["b"].square().sum()}

    options: Any
    for options in ({}, {"where": lambda path: path == "a"}):
        jd.grad(losses, jd.upgrad(), **options)(None, PARAMS)


def test_a_head_that_is_a_constant_is_named():
    heads = {
        "kept": lambda params, z, x: (params * z).sum(),
        "lost": lambda params, z, x: (params * z).sum().detach(),
    }
    step = jd.grad(jd.multitask(lambda params, x: params * x, heads), jd.mean())
    params = PARAMS["a"], {"kept": PARAMS["b"], "lost": PARAMS["b"]}
    with pytest.warns(UserWarning, match=r"Losses \['lost'\] are constants"):
        step(None, params, torch.ones(2))
    step(None, params, torch.ones(2), present={"kept": True, "lost": False})


@pytest.mark.parametrize("size", [1, 5])
def test_outputs_and_targets_of_two_shapes(size):
    params, x, y = {"w": torch.randn(1, 3)}, torch.randn(size, 3), torch.randn(size)
    objective = jd.instancewise(lambda p, x, y: (x @ p["w"].T - y).square())
    for fn in (jd.gramian(objective), lambda *args: jd.init_state(jd.upgrad(), objective, *args)):
        with pytest.raises(ValueError, match=r"as many losses for each example.*by squeeze"):
            fn(params, x, y)
