"""Published numbers of scalarizers, and closed forms where part of a formula is constant."""

import math

import pytest
import torch

import torchjd_func as jd
from tests.matrices import A
from tests.scalarizer_registry import (
    LA,
    LB,
    METHODS,
    WA,
    WB,
    assert_close,
    draws,
    experienced,
    gradient,
    losses,
    vec,
)
from torchjd_func import scalarizers as sc
from torchjd_func.scalarization._uncertainty import IMTLLState, UWState

ZB = [0.5, 0.5, 0.5]

GOLDEN = [
    (sc.mean(), LA, 1.75, [0.5, 0.5]),
    (sc.sum(), LB, 7.0, [1.0, 1.0, 1.0]),
    (sc.constant(WA), LA, 2.375, WA),
    (sc.constant(WB), LB, 2.8, WB),
    (sc.geometric_mean(), LA, 1.22474487, [1.22474487, 0.20412415]),
    (sc.geometric_mean(), LB, 2.0, [2 / 3, 1 / 3, 1 / 6]),
    (sc.uw(), LA, 1.75, [0.5, 0.5]),
    (sc.uw("classification"), LA, 3.5, [1.0, 1.0]),
    (sc.uw(start=-0.5), LA, 2.38526222, [0.82436064, 0.82436064]),
    (sc.imtl_l(), LA, 3.5, [1.0, 1.0]),
    (sc.dwa(), LA, 3.5, [1.0, 1.0]),
    (sc.famo(), LA, 0.17377077, [0.85714286, 0.14285714]),
    (sc.tchebycheff(WA), LA, 2.25, [0.0, 0.75]),
    (sc.tchebycheff(WB, ZB), LB, 1.75, [0.0, 0.0, 0.5]),
    (sc.tchebycheff(WB, ZB, convention="divide"), LB, 7.0, [0.0, 0.0, 2.0]),
    (sc.tchebycheff([1.0, 1.0], [3.0, 4.0], absolute=True), LA, 2.5, [-1.0, 0.0]),
    (sc.augmented_tchebycheff(WA), LA, 2.36875, [0.0125, 0.7875]),
    (sc.augmented_tchebycheff(WB, ZB), LB, 1.865, [0.01, 0.015, 0.525]),
    (sc.augmented_tchebycheff(WA, augmentation="unweighted"), LA, 2.425, [0.05, 0.8]),
    (sc.augmented_tchebycheff(WB, ZB, augmentation="unweighted"), LB, 2.025, None),
    (sc.stch(1.0, WA), LA, 2.36282228, [0.02667265, 0.66998205]),
    (sc.stch(0.1, WA), LA, 2.25, None),
    (sc.stch(1.0, WB, ZB), LB, 2.13156967, [0.02622591, 0.05582450, 0.34139441]),
    (sc.stch(1.0), LA, 1.75192908, None),
    (sc.stch(1.0, nadir=[1.0, 4.0]), LA, 2 * math.log(1.25), [1.6, 0.4]),
    (sc.cosmos(WA, 1.0), LA, 1.38723703, [0.19941754, 0.75843041]),
    (sc.cosmos(WA, 5.0), LA, -2.56381483, [-0.00291228, 0.79215205]),
    (sc.cosmos(WB, 1.0), LB, 1.80881074, None),
    (sc.pbi(WA, theta=0.0), LA, 3.00416378, None),
    (sc.pbi(WA, theta=1.0), LA, 3.47850543, [-0.63245553, 1.26491106]),
    (sc.pbi(WA), LA, 5.37587202, [-4.42718872, 2.52982213]),
    (sc.pbi(WB, ZB), LB, 8.28342003, None),
    (sc.pbi([1.0, 2.0], theta=0.0), [2.0, 4.0], 4.47213595, [0.44721360, 0.89442719]),
    (sc.p_norm(2.0, WA), LA, 2.25346955, [0.01386750, 0.74884526]),
    (sc.p_norm(1.0, WB, ZB), LB, 2.3, WB),
    (sc.p_norm(2.0, WB, ZB), LB, 1.80969611, None),
    (sc.p_norm(4.0, WB, ZB), LB, 1.75191435, None),
    (sc.power_mean(-1.0, WA), LA, 1.33333333, None),
    (sc.power_mean(0.5, WA), LA, 2.17802933, None),
    (sc.power_mean(2.0, WA), LA, 2.61007663, None),
    (sc.power_mean(-1.0, WB), LB, 2.10526316, None),
    (sc.power_mean(0.5, WB), LB, 2.63823376, None),
    (sc.power_mean(2.0, WB), LB, 3.06594194, None),
    (sc.softmax(), LA, 2.81035455, [-0.09940111, 1.09940111]),
    (sc.softmax(variant="detached"), LA, 2.81035455, [0.07585818, 0.92414182]),
    (sc.softmax(variant="log_sum_exp"), LA, 3.07888973, [0.07585818, 0.92414182]),
    (sc.softmax(0.1), LA, 1.90544125, None),
    (sc.softmax(0.1, variant="log_sum_exp"), LA, 8.75939420, None),
    (sc.softmax(-1.0), LA, 0.68964545, None),
    (sc.softmax(-1.0, variant="log_sum_exp"), LA, 0.42111027, None),
    (sc.log_sum(), LA, math.log(1.5), [2.0, 1 / 3]),
    (sc.log_sum(1.0), LA, math.log(6.0), [1 / 1.5, 0.25]),
    (sc.cvar(0.5), LB, 10 / 3, [0.0, 1 / 3, 2 / 3]),
    (sc.cvar(1.0), LB, 7 / 3, [1 / 3, 1 / 3, 1 / 3]),
    (sc.cvar(0.1), LB, 4.0, [0.0, 0.0, 1.0]),
    (sc.cvar(k=2), LB, 3.0, [0.0, 0.5, 0.5]),
    (sc.hypervolume([2.0, 4.0]), LA, -0.40546511, [0.66666667, 1.0]),
    (sc.hypervolume(slack=1.5), LA, -math.log(6.0), [0.25, 1 / 1.5]),
]


@pytest.mark.parametrize(("scalarizer", "values", "loss", "slope"), GOLDEN)
def test_golden_values(scalarizer, values, loss, slope):
    assert_close(scalarizer(vec(values))[0], loss)
    if slope is not None:
        assert_close(gradient(scalarizer, vec(values), None), slope)


@pytest.mark.parametrize(
    ("transform", "loss", "slope"),
    [("power", -1.5625, 3.125), ("root", -1.25, 1.25), ("log", -math.log(1.5625), 2.0)],
)
def test_golden_hypervolume_in_a_direction(transform, loss, slope):
    scalarizer = sc.hypervolume(
        [2.0, 4.0], variant="random", direction=[0.6, 0.8], transform=transform
    )
    assert_close(scalarizer(vec(LA))[0], loss)
    assert_close(gradient(scalarizer, vec(LA), None), [0.0, slope])


def test_golden_learned_scales():
    s = vec([0.5, -0.5])
    for scalarizer, state, loss, slope, by_state in (
        (sc.uw(), UWState(s), 2.62471457, [0.30326533, 0.82436064], [0.34836734, -1.97308191]),
        (
            sc.imtl_l(),
            IMTLLState(s),
            2.64395261,
            [1.64872127, 0.60653066],
            [-0.17563936, 0.81959198],
        ),
    ):
        assert_close(scalarizer(vec(LA), state)[0], loss)
        assert_close(gradient(scalarizer, vec(LA), state), slope)
        got = torch.func.grad(lambda state, method=scalarizer: method(vec(LA), state)[0])(state)
        assert_close(got[0], by_state)


def test_golden_dwa():
    scalarizer = sc.dwa()
    state = scalarizer.init(vec(LA))
    for epoch in ([[0.5, 3.0], [1.5, 5.0]], [[0.8, 3.6]]):
        for batch in epoch:
            assert_close(gradient(scalarizer, vec(batch), state), [1.0, 1.0], atol=1e-12)
            _, state = scalarizer(vec(batch), state)
        assert scalarizer.observe is not None
        state = scalarizer.observe(None, state)
    assert_close(scalarizer(vec(LA), state)[0], 3.56248698)
    assert_close(gradient(scalarizer, vec(LA), state), [0.97500521, 1.02499479])


def test_golden_famo():
    scalarizer = sc.famo()
    assert scalarizer.observe is not None
    _, state = scalarizer(vec(LA))
    state = scalarizer.observe(vec([0.45, 2.9]), state)
    assert_close(state.logits, [-0.025, 0.025], atol=1e-7)
    loss, state = scalarizer(vec([0.45, 2.9]), state)
    assert_close(loss, 0.12411045)
    state = scalarizer.observe(vec([0.40, 2.9]), state)
    assert_close(state.logits, [-0.04959609, 0.04959609])


def test_golden_famo_gradient_of_the_logits():
    scalarizer = sc.famo(1.0, 0.0, optimizer="sgd")
    assert scalarizer.observe is not None
    _, state = scalarizer(vec(LA))
    state = scalarizer.observe(vec([0.45, 2.9]), state)
    assert_close(state.logits, [-0.01786474, 0.01786474])
    plain = sc.famo(0.5, 0.1, optimizer="sgd")
    assert plain.observe is not None
    _, at = plain(vec(LA), state)
    z, delta = state.logits.softmax(0), -vec([-0.1, 0.2])
    at = plain.observe((vec(LA) + 1e-8) * torch.exp(-delta) - 1e-8, at)
    want = state.logits - 0.5 * (z * (delta - z @ delta) + 0.1 * state.logits)
    torch.testing.assert_close(at.logits, want, rtol=1e-12, atol=1e-12)


def test_golden_stch_on_the_matrix():
    scalarizer = sc.stch(1.0, nadir=[1.0, 4.0])
    got, _ = jd.grad(lambda x: A @ x + vec(LA), scalarizer)(None, vec([0.0, 0.0, 0.0]))
    assert_close(got, [-4.0, 2.0, 2.0])


def test_gradients_with_constant_parts():
    values = losses(4)
    method = sc.group_dro(0.3)
    weights = torch.ones(4, dtype=torch.float64) / 4
    state = method.init(values)
    for step in range(3):
        batch = values * 0.9**step
        weights = weights * torch.exp(0.3 * batch)
        weights = weights / weights.sum()
        torch.testing.assert_close(gradient(method, batch, state), weights)
        _, state = method(batch, state)
    scalarizer, state = experienced(METHODS["famo"], values)
    z = state.logits.softmax(0) / (values + 1e-8)
    assert float(state.logits.abs().amin()) > 1e-4
    torch.testing.assert_close(gradient(scalarizer, values, state), z / z.sum())
    scalarizer, state = experienced(METHODS["dwa"], values)
    rate = state.newer / state.older
    torch.testing.assert_close(
        gradient(scalarizer, values, state), 4 * (rate / 2).softmax(0), rtol=1e-12, atol=0
    )
    assert float(rate.std()) > 1e-3


@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.4, 0.75, 0.99, 1.0])
def test_cvar_is_the_minimum_over_thresholds(alpha):
    for values in draws(5, 5):
        excess = (values - values.unsqueeze(-1)).clamp(min=0).mean(-1)
        want = (values + excess / alpha).min()
        torch.testing.assert_close(sc.cvar(alpha)(values)[0], want)
