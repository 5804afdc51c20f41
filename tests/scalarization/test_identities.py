"""Scalarizers against each other."""

import itertools
import math

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.scalarizer_registry import (
    LB,
    WB,
    assert_close,
    draws,
    gradient,
    vec,
)
from torchjd_func import scalarizers as sc
from torchjd_func.scalarization._uncertainty import IMTLLState, UWState


def test_imtl_l_is_twice_uw_of_the_opposite_scales():
    for values, s in zip(draws(5, 3), draws(10, 3)[5:].log(), strict=True):
        double = 2 * sc.uw()(values, UWState(-s))[0]
        torch.testing.assert_close(sc.imtl_l()(values, IMTLLState(s))[0], double)


def test_learned_scales_at_their_optimum():
    for values in draws(5, 3):
        total = sc.log_sum()(values)[0] + 3
        for scalarizer, state, best in (
            (sc.uw(), UWState(values.log()), total / 2),
            (sc.imtl_l(), IMTLLState(-values.log()), total),
        ):
            torch.testing.assert_close(scalarizer(values, state)[0], best)
            slope = torch.func.grad(lambda st, v=values, sc=scalarizer: sc(v, st)[0])(state)
            assert_close(slope[0], [0.0, 0.0, 0.0], atol=1e-12)


def test_famo_weighs_by_the_inverse_losses_at_first():
    for values in draws(5, 4):
        inverse = 1 / values
        got = gradient(sc.famo(), values, None)
        torch.testing.assert_close(got, inverse / inverse.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0, 10.0])
def test_stch_is_bounded_by_tchebycheff(mu):
    for values, w in zip(draws(10, 4), draws(20, 4)[10:], strict=True):
        sharp, smooth = sc.tchebycheff(w)(values)[0], sc.stch(mu, w)(values)[0]
        assert float(sharp) - 1e-12 <= float(smooth) <= float(sharp) + mu * math.log(4) + 1e-12


def test_norms_fall_and_means_rise_with_p():
    for values, w in zip(draws(10, 4), draws(20, 4)[10:], strict=True):
        norms = [float(sc.p_norm(p, w)(values)[0]) for p in (1.0, 1.5, 2.0, 8.0, 100.0)]
        assert norms == sorted(norms, reverse=True)
        assert norms[-1] >= float(sc.tchebycheff(w)(values)[0])
        powers = (-200.0, -3.0, -1e-9, 0.0, 1e-9, 1.0, 2.0, 200.0)
        means = [float(sc.power_mean(p, w)(values)[0]) for p in powers]
        assert all(a <= b * (1 + 1e-14) for a, b in itertools.pairwise(means))
        assert means[0] == pytest.approx(float(values.min()), rel=0.05)
        assert means[-1] == pytest.approx(float(values.max()), rel=0.05)


def test_limits_are_other_scalarizers():
    values = vec(LB)
    for first, second in (
        (sc.p_norm(1.0, WB), sc.constant(WB)),
        (sc.p_norm(1e6, WB), sc.tchebycheff(WB)),
        (sc.power_mean(0.0), sc.geometric_mean()),
        (sc.power_mean(1.0), sc.mean()),
        (sc.softmax(0.0), sc.mean()),
        (sc.softmax(0.0, variant="log_mean_exp"), sc.mean()),
        (sc.cosmos(WB, 0.0), sc.constant(WB)),
        (sc.augmented_tchebycheff(WB, rho=0.0), sc.tchebycheff(WB)),
        (sc.stch(1e-6, WB), sc.tchebycheff(WB)),
        (sc.cvar(1.0), sc.mean()),
        (sc.cvar(k=3), sc.mean()),
        (sc.group_dro(0.0), sc.mean()),
        (sc.softmax(1.0, variant="detached"), sc.group_dro(1.0)),
    ):
        torch.testing.assert_close(first(values)[0], second(values)[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            gradient(first, values, None), gradient(second, values, None), rtol=1e-5, atol=1e-9
        )


def test_random_hypervolumes_average_to_the_hypervolume():
    points = vec([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0]])
    scalarizer = sc.hypervolume([5.0, 5.0], variant="random")
    keys = jd.random.split(jd.random.key(2), 100_000)

    def best(key):
        state = scalarizer.init(points[0], key=key)
        return torch.stack([-scalarizer(point, state)[0] for point in points]).amax()

    assert float(vmap(best)(keys).mean()) * math.pi / 4 == pytest.approx(11.0, abs=0.05)
