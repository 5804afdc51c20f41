"""What no argument holds may change later: constants, thresholds, random generators, modes."""

import math
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchjd_func as jd
from tests.differentiate.test_layerwise_kinds import rand
from tests.programs import by_loops

PARAMS = [rand(4, 3)]
X = rand(5, 3)


def hidden(params, x):
    """Return what all objectives here put together."""
    return F.linear(x, params[0]).tanh()


def coefficient(params, x, value):
    h = hidden(params, x)
    return (h + value * h.roll(1, 0)).square().sum(1)


def matrix(params, x, value):
    size = len(x)
    mixing = torch.from_numpy(np.eye(size) + value * np.eye(size, k=1))
    return (mixing @ hidden(params, x)).square().sum(1)


def mask(params, x, value):
    groups = np.arange(len(x)) // (2 if value else 1)
    h = hidden(params, x)
    scores = (h @ h.T).masked_fill(~torch.from_numpy(groups[:, None] == groups), -torch.inf)
    return (scores.softmax(1) @ h).square().sum(1)


def hinge(params, x, value):
    h = hidden(params, x)
    margin = 100 * value - 50
    return h.sum(1) + F.relu(margin - (h - h.roll(1, 0)).square().sum(1))


CONSTANTS = {
    "a coefficient": (coefficient, lambda value: torch.full((4,), value).double()),
    "a matrix of numpy": (matrix, float),
    "a mask of numpy": (mask, float),
    "a threshold": (hinge, float),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_examples_that_a_constant_keeps_apart_for_now(name):
    fn, constant = CONSTANTS[name]
    held = [constant(0.0)]
    objective = jd.instancewise(lambda params, x: fn(params, x, held[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jd.gramian(objective)(PARAMS, X)
        held[0] = constant(1.0)
        found = jd.gramian(objective)(PARAMS, X)
    rows = by_loops(fn, PARAMS, X, held[0])
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


COEFFICIENTS = {
    "of numpy": (lambda h, m, v: h + v * m, np.float64(1e-9), np.float64(1.0)),
    "of numpy, single": (lambda h, m, v: h + v * m, np.float32(0.0), np.float32(1.0)),
    "complex": (lambda h, m, v: h + (m * v).real, 0j, 1 + 0j),
    "in place": (lambda h, m, v: h + m.clone().mul_(v), 0.0, 1.0),
    "of a sum in place": (lambda h, m, v: h.clone().add_(m, alpha=v), 0.0, 1.0),
    "between two in place": (lambda h, m, v: h.clone().lerp_(m, v), 0.0, 0.5),
    "an infinite mask": (
        lambda h, m, v: (h @ h.T).masked_fill(torch.eye(len(h)) == 0, v).softmax(1) @ h,
        -math.inf,
        0.0,
    ),
    "a mask of large numbers": (
        lambda h, m, v: (h @ h.T).masked_fill(torch.eye(len(h)) == 0, v).softmax(1) @ h,
        -1e9,
        0.0,
    ),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_examples_that_a_number_keeps_apart_for_now(name):
    mix, *values = COEFFICIENTS[name]

    def fn(params, x):
        h = hidden(params, x)
        return mix(h, h.roll(1, 0), held[0]).square().sum(1)

    objective, held = jd.instancewise(fn), [values[0]]
    for held[0] in values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = jd.gramian(objective)(PARAMS, X)
        rows = by_loops(fn, PARAMS, X)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


class Rolled(nn.Module):
    """Adds a neighbour times a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(PARAMS[0])
        self.register_buffer("scale", torch.zeros(4).double())

    def forward(self, x):
        return coefficient([self.weight], x, self.scale)


def test_a_module_is_tried_with_other_buffers():
    apply, params, buffers = jd.functionalize(Rolled())
    objective = jd.instancewise(lambda params, buffers, x: apply(params, buffers, x)[0])
    with pytest.warns(UserWarning, match="depend on other examples"):
        jd.gramian(objective)(params, buffers, X)
    scale = torch.ones(4).double()
    found = jd.gramian(objective)(params, {"scale": scale}, X)
    rows = by_loops(coefficient, PARAMS, X, scale)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("closed_over", [False, True])
def test_the_first_call_draws_what_others_do(closed_over):
    shared = torch.Generator()

    def losses(params, x, generator):
        h = hidden(params, x)
        noise = torch.randn(h.shape, dtype=h.dtype, generator=generator)
        return (h + noise).square().sum(1)

    def held(params, x):
        return losses(params, x, shared)

    def drawn():
        return shared.manual_seed(3) if closed_over else torch.Generator().manual_seed(3)

    fn = held if closed_over else losses
    objective = jd.instancewise(fn)
    rest = (X,) if closed_over else (X, drawn())
    drawn()
    rows = by_loops(fn, PARAMS, *rest)
    for _ in range(2):
        rest = (X,) if closed_over else (X, drawn())
        drawn()
        found = jd.gramian(objective)(PARAMS, *rest)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


def by_python(params, x):
    for _ in range(4):
        if random.random() < 0.5:  # a layer is dropped
            continue
        x = F.linear(x, params[0] @ params[0].T).tanh()
    return hidden(params, x).square().sum(1)


def by_numpy(params, x):
    scale = torch.from_numpy(np.random.uniform(0.5, 2.0, len(x)))
    h = hidden(params, x) * scale.unsqueeze(1)
    return h.roll(int(np.random.randint(0, 4)), 1).cumsum(1).square().sum(1)


@pytest.mark.parametrize("losses", [by_python, by_numpy])
def test_draws_of_python_and_numpy_are_those_of_plain_autograd(losses):
    weights, x = [rand(4, 4)], rand(5, 4)
    objective = jd.instancewise(losses)
    for seed in (*range(8), *range(4)):
        found = []
        for run in (jd.gramian(objective), partial(by_loops, losses)):
            random.seed(seed)
            np.random.seed(seed)
            found.append(run(weights, x))
            found.append((random.random(), np.random.uniform()))
        assert found[1] == found[3]
        torch.testing.assert_close(found[0], found[2] @ found[2].T, rtol=1e-9, atol=1e-12)


def squares(params, x):
    return hidden(params, x).square().sum(1)


@pytest.mark.parametrize("route", ["layerwise", "jacobian"])
def test_inference_mode_changes_nothing(route):
    rows = by_loops(squares, PARAMS, X)
    step = jd.gramian(jd.instancewise(squares), route=route)
    with torch.inference_mode():
        found = step(PARAMS, X)
        copies = [PARAMS[0].clone()], X.clone()
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step(*copies), rows @ rows.T, rtol=1e-9, atol=1e-12)


def test_parameters_without_entries():
    def losses(params, x):
        return squares(params, x) + F.linear(x, params[1]).sum(1)

    params = [*PARAMS, rand(0, 3)]
    rows = by_loops(losses, params, X)
    found = jd.gramian(jd.instancewise(losses))(params, X)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", ["layerwise", "jacobian"])
def test_control_flow_that_torch_does_not_differentiate(route):
    def losses(params, x):
        h = hidden(params, x)
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (h,)).sum(1)

    with pytest.raises(ValueError, match=r"no torch\.cond"):
        jd.gramian(jd.instancewise(losses), route=route)(PARAMS, X)


@pytest.mark.parametrize("write", [torch.lerp, lambda h, p, c: torch.where(c > 0, h, p)])
def test_a_constant_of_another_shape(write):
    constant, params, x = [rand(2)], [rand(2)], rand(2, 2)

    def losses(p, x):
        return write(x, p[0].expand(len(x), 2), constant[0]).sin().sum(1)

    objective = jd.instancewise(losses)
    for constant[0] in (rand(2), rand(2, 2), rand(2, 1), rand(2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = jd.gramian(objective)(params, x)
        rows = by_loops(losses, params, x)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)
