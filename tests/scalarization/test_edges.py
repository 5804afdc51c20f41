"""Scalarizers where formulas divide by zero, tie or overflow; protocols; errors."""

import math

import pytest
import torch
from torch import tensor
from torchjd import scalarization as tj

import torchjd_func as jd
from tests.scalarizer_registry import (
    LA,
    WA,
    WB,
    assert_close,
    draws,
    gradient,
    vec,
)
from torchjd_func import scalarizers as sc
from torchjd_func.scalarization._dwa import DWAState


def test_ties_share_the_gradient():
    for scalarizer in (sc.tchebycheff([0.5, 0.25, 0.25]), sc.hypervolume([5.0, 5.0, 5.0])):
        assert torch.isfinite(gradient(scalarizer, vec([1.0, 2.0, 2.0]), None)).all()
    got = gradient(sc.tchebycheff([1.0, 0.5, 0.5]), vec([1.0, 2.0, 2.0]), None)
    assert_close(got, [1 / 3, 1 / 6, 1 / 6])


def test_zero_loss_among_others():
    values = vec([0.0, 2.0])
    assert_close(sc.geometric_mean()(values)[0], 0.0, atol=0)
    assert_close(gradient(sc.geometric_mean(), values, None), [0.0, 0.0], atol=0)
    assert torch.isnan(sc.geometric_mean()(vec([-1.0, 2.0]))[0])
    leaf = values.clone().requires_grad_()
    assert torch.isnan(torch.autograd.grad(tj.GeometricMean()(leaf), leaf)[0]).any()
    assert_close(gradient(sc.p_norm(1.0, [0.5, 0.5], [0.0, 0.0]), values, None), [0.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e5, 1e12])
def test_pbi_on_the_ray_has_no_second_term(dtype, scale):
    for w in draws(20, 3).to(dtype):
        scalarizer = sc.pbi(w, theta=1e3)
        got = gradient(scalarizer, scale * w, None)
        torch.testing.assert_close(got, w / w.norm())
        off = scale * (w + w.norm() * tensor([1e-3, 0.0, 0.0], dtype=dtype))
        assert float((gradient(scalarizer, off, None) - got).norm()) > 100


def test_weights_may_be_one_hot():
    values, one_hot = vec([1.0, 2.0, 4.0]), vec([0.0, 1.0, 0.0])
    for scalarizer in (
        sc.constant(one_hot),
        sc.tchebycheff(one_hot),
        sc.p_norm(1.5, one_hot),
        sc.power_mean(-3.0, one_hot),
        sc.power_mean(0.0, one_hot),
        sc.power_mean(1e-3, one_hot),
        sc.stch(1e-3, one_hot),
        sc.pbi(one_hot, theta=0.0),
        sc.cosmos(one_hot, 0.0),
    ):
        assert_close(scalarizer(values)[0], 2.0)
        assert_close(gradient(scalarizer, values, None), [0.0, 1.0, 0.0])


def test_weights_given_as_numbers_are_not_rounded():
    assert torch.equal(sc.constant([0.1])(vec([1.0]))[0], torch.tensor(0.1, dtype=torch.float64))


def test_first_of_equal_losses_count():
    values = torch.ones(40, dtype=torch.float64)
    got = gradient(sc.cvar(k=3), values, None)
    assert got.nonzero().flatten().tolist() == [0, 1, 2]


def test_cosine_is_free_of_underflow():
    tiny = torch.tensor(LA) * 1e-30
    scalarizer = sc.cosmos(WA, 1.0)
    cosine = torch.nn.functional.cosine_similarity(vec(WA), vec(LA), dim=0)
    torch.testing.assert_close(scalarizer(tiny)[0].double(), -cosine, rtol=1e-6, atol=0)
    assert_close(gradient(scalarizer, vec([0.0, 0.0]), None), WA)


@pytest.mark.parametrize("p", [1e-12, -1e-7, 1e-5, 1e-3, 0.1])
def test_power_mean_is_accurate_near_zero(p):
    values = tensor([0.5, 3.0, 1.2])
    exact = values.double()
    got = sc.power_mean(p)(values)[0].double()
    want = sc.geometric_mean()(exact)[0] * torch.exp(p / 2 * exact.log().var(correction=0))
    torch.testing.assert_close(got, want, rtol=max(p * p, 3e-7), atol=0)
    slope = gradient(sc.power_mean(p), values, None).double()
    torch.testing.assert_close(slope, (exact / want) ** (p - 1) / 3, rtol=p * p + 1e-6, atol=0)


def test_large_values_do_not_overflow():
    values = tensor([1e30, 3e30])
    for scalarizer in (
        sc.p_norm(8.0),
        sc.power_mean(8.0),
        sc.power_mean(-8.0),
        sc.geometric_mean(),
        sc.stch(0.01),
        sc.softmax(1e3),
        sc.softmax(variant="log_mean_exp"),
        sc.tchebycheff(),
    ):
        assert torch.isfinite(scalarizer(values)[0])
        assert torch.isfinite(gradient(scalarizer, values, None)).all()


def test_minimum_is_precise_next_to_a_large_loss():
    values = tensor([1e-6, 1e6])
    got = sc.power_mean(-50.0)(values)[0]
    torch.testing.assert_close(got, tensor(1e-6 * 2 ** (1 / 50)), rtol=1e-5, atol=0)


def test_single_objective():
    for scalarizer, loss, slope in (
        (sc.famo(), 2.0 * math.log(2.0), 1.0),
        (sc.geometric_mean(), 2.0, 1.0),
        (sc.pbi([3.0]), 2.0, 1.0),
        (sc.cosmos([0.5], 1.0), 0.0, 0.5),
        (sc.cvar(), 2.0, 1.0),
    ):
        assert_close(scalarizer(vec([2.0]))[0], loss, atol=1e-6)
        assert_close(gradient(scalarizer, vec([2.0]), None), [slope], atol=1e-6)


def test_famo_of_one_objective_keeps_its_logits():
    scalarizer = sc.famo()
    assert scalarizer.observe is not None
    _, state = scalarizer(vec([2.0]))
    assert_close(scalarizer.observe(vec([1.5]), state).logits, [0.0], atol=0)


def test_famo_observation_without_a_call_changes_nothing():
    scalarizer = sc.famo()
    assert scalarizer.observe is not None
    start = scalarizer.init(vec(LA))
    assert torch.equal(scalarizer.observe(vec(LA), start).logits, start.logits)
    _, state = scalarizer(vec(LA), start)
    once = scalarizer.observe(vec([0.4, 3.0]), state)
    twice = scalarizer.observe(vec([0.4, 3.0]), once)
    assert torch.equal(twice.logits, once.logits)
    assert twice.step.tolist() == once.step.tolist() == [1, 1]


def test_dwa_observations():
    scalarizer = sc.dwa()
    assert scalarizer.observe is not None
    start = scalarizer.init(vec(LA))
    assert torch.equal(scalarizer.observe(None, start).newer, start.newer)
    _, state = scalarizer(vec(LA), start)
    state = scalarizer.observe(None, state)
    assert torch.equal(scalarizer.observe(None, state).older, state.older)
    given = scalarizer.observe({"a": vec([0.8]), "b": vec([3.6])}, state)
    assert_close(given.newer, [0.8, 3.6])
    assert_close(given.older, LA)
    assert given.step.tolist() == [0, 0]


def test_dwa_at_a_zero_average():
    zero = vec([0.0, 0.0])
    step = torch.zeros(2, dtype=torch.int64)
    state = DWAState(zero, step, vec([1.0, 2.0]), vec([0.0, 4.0]))
    want = 2 * vec([1.0, 0.5]).div(2).softmax(0)
    torch.testing.assert_close(gradient(sc.dwa(), vec(LA), state), want)


def test_group_dro_remembers_weights_that_would_underflow():
    scalarizer = sc.group_dro(10.0)
    state = scalarizer.init(tensor([0.0, 0.0]))
    for values in [[0.0, 50.0]] * 3 + [[50.0, 0.0]] * 3:
        _, state = scalarizer(tensor(values), state)
    torch.testing.assert_close(state.log_weights.exp(), tensor([0.5, 0.5]))


@pytest.mark.parametrize("transform", ["power", "root", "log"])
def test_random_hypervolume_outside_the_reference_has_no_gradient(transform):
    scalarizer = sc.hypervolume([2.0, 2.0], variant="random", transform=transform)
    state = scalarizer.init(vec(LA), key=jd.random.key(0))
    assert_close(scalarizer(vec(LA), state)[0], math.inf if transform == "log" else 0.0)
    for corner in ([2.0, 2.0], [0.5, 4.0], [0.5, 3.0], [0.5, 2.0]):
        fixed = sc.hypervolume(corner, variant="random", direction=[1.0, 1.0], transform=transform)
        assert_close(gradient(fixed, vec(LA), None), [0.0, 0.0], atol=0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sc.constant(torch.ones(1, 1)), "weights"),
        (lambda: sc.log_sum(-1.0), "offset"),
        (lambda: sc.uw("ranking"), "kind"),
        (lambda: sc.uw(["regression"] * 3)(vec(LA)), "kind"),
        (lambda: sc.dwa(0.0), "temperature"),
        (lambda: sc.famo(-1.0), "beta"),
        (lambda: sc.famo(gamma=-1.0), "gamma"),
        (lambda: sc.famo(optimizer="adagrad"), "optimizer"),
        (lambda: sc.famo(min_losses=WB)(vec(LA)), "min_losses"),
        (lambda: sc.tchebycheff(convention="add"), "convention"),
        (lambda: sc.tchebycheff(WB)(vec(LA)), "weights"),
        (lambda: sc.tchebycheff(None, WB)(vec(LA)), "reference"),
        (lambda: sc.augmented_tchebycheff(rho=-1.0), "rho"),
        (lambda: sc.augmented_tchebycheff(augmentation="none"), "augmentation"),
        (lambda: sc.stch(0.0), "mu"),
        (lambda: sc.stch(1.0, WA, nadir=WA), "nadir"),
        (lambda: sc.stch(nadir=WB)(vec(LA)), "nadir"),
        (lambda: sc.cosmos(WA, -1.0), "lambda_"),
        (lambda: sc.pbi(theta=-1.0), "theta"),
        (lambda: sc.p_norm(0.5), "p"),
        (lambda: sc.p_norm(math.inf), "p"),
        (lambda: sc.power_mean(-math.inf), "p"),
        (lambda: sc.power_mean(math.nan), "p"),
        (lambda: sc.softmax(variant="soft"), "variant"),
        (lambda: sc.softmax(0.0, variant="log_sum_exp"), "kappa"),
        (lambda: sc.cvar(0.0), "alpha"),
        (lambda: sc.cvar(1.5), "alpha"),
        (lambda: sc.cvar(k=0), "k"),
        (lambda: sc.cvar(k=3)(vec(LA)), "k"),
        (lambda: sc.group_dro(-1.0), "eta"),
        (lambda: sc.hypervolume(slack=1.0), "slack"),
        (lambda: sc.hypervolume(variant="exact"), "variant"),
        (lambda: sc.hypervolume(variant="random"), "reference"),
        (lambda: sc.hypervolume(WA, variant="random", transform="square"), "transform"),
        (lambda: sc.hypervolume(WA, variant="random", direction=WB)(vec(LA)), "direction"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=rf"`{name}` must .*, got .*\. [A-Z]"):
        call()
