"""Numbers of scalarizers: published ones, those of TorchJD, closed forms, identities, edges."""

import itertools
import math

import pytest
import torch
from torch import tensor
from torch.func import vmap
from torchjd import scalarization as tj

import torchjd_func as jd
from tests.matrices import A
from tests.scalarizer_registry import METHODS, experienced, gradient, losses
from torchjd_func import scalarizers as sc
from torchjd_func.scalarization._dwa import DWAState
from torchjd_func.scalarization._uncertainty import IMTLLState, UWState

LA, LB = [0.5, 3.0], [1.0, 2.0, 4.0]
WA, WB = [0.25, 0.75], [0.2, 0.3, 0.5]
ZB = [0.5, 0.5, 0.5]


def vec(values) -> torch.Tensor:
    """Return a float64 vector."""
    return tensor(values, dtype=torch.float64)


def assert_close(got, want, atol: float = 6e-9) -> None:
    """Compare to the digits that were published."""
    torch.testing.assert_close(got, vec(want), rtol=0, atol=atol)


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


# Parity with TorchJD


def both(scalarizer, state, peer, values):
    """Compare value and gradient with those of TorchJD; return the next state."""
    leaf = values.clone().requires_grad_()
    want = peer(leaf)
    (slope,) = torch.autograd.grad(want, leaf)
    loss, later = scalarizer(values, state)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(scalarizer, values, state), slope.reshape(values.shape), rtol=1e-11, atol=1e-12
    )
    return later


def draws(n: int, m: int) -> torch.Tensor:
    """Return positive vectors of all scales."""
    return jd.random.normal(jd.random.key(m), (n, m), dtype=torch.float64).exp()


STATELESS = [
    (lambda w, z: sc.mean(), lambda w, z: tj.Mean()),
    (lambda w, z: sc.sum(), lambda w, z: tj.Sum()),
    (lambda w, z: sc.constant(w), lambda w, z: tj.Constant(w)),
    (lambda w, z: sc.geometric_mean(), lambda w, z: tj.GeometricMean()),
    (lambda w, z: sc.cosmos(w, 3.0), lambda w, z: tj.COSMOS(3.0, w)),
    (lambda w, z: sc.stch(0.3), lambda w, z: tj.STCH(0.3)),
    (lambda w, z: sc.stch(0.02, w, z), lambda w, z: tj.STCH(0.02, w, z)),
]


@pytest.mark.parametrize(("make", "peer"), STATELESS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_parity_without_state(make, peer, m):
    w, z = draws(1, m)[0], -draws(2, m)[1]
    for values in draws(10, m):
        both(make(w, z), None, peer(w, z), values)


@pytest.mark.parametrize("m", [2, 5])
def test_parity_of_pbi_but_for_its_constant(m):
    w, z = draws(1, m)[0], -draws(2, m)[1]
    for values in draws(10, m):
        leaf = values.clone().requires_grad_()
        want = tj.PBI(5.0, w, z)(leaf)
        (slope,) = torch.autograd.grad(want, leaf)
        got = sc.pbi(w, z)(values)[0]
        assert 0 <= float(want.detach() - got) <= 5e-6
        torch.testing.assert_close(gradient(sc.pbi(w, z), values, None), slope, rtol=1e-8, atol=0)


def test_parity_of_learned_scales():
    for make, peer, field, state in (
        (sc.uw, tj.UW(3), "log_var", UWState),
        (sc.imtl_l, tj.IMTLL(3), "log_scale", IMTLLState),
    ):
        peer.double()
        for values, s in zip(draws(5, 3), draws(10, 3)[5:].log(), strict=True):
            getattr(peer, field).data = s.clone()
            both(make(), state(s), peer, values)
            (want,) = torch.autograd.grad(peer(values), list(peer.parameters()))
            got = torch.func.grad(lambda st, v=values, make=make: make()(v, st)[0])(state(s))
            torch.testing.assert_close(got[0], want)


def test_parity_of_dwa():
    scalarizer, peer = sc.dwa(1.5), tj.DWA(1.5)
    assert scalarizer.observe is not None
    state = scalarizer.init(vec(LB))
    for epoch in draws(15, 3).reshape(5, 3, 3):
        for values in epoch:
            state = both(scalarizer, state, peer, values)
        state = scalarizer.observe(None, state)
        peer.step()


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.1])
def test_parity_of_famo(gamma):
    bounds = vec([-0.1, 0.0, -2.0])
    scalarizer = sc.famo(0.05, gamma, min_losses=bounds)
    peer = tj.FAMO(3, bounds, 0.05, gamma).double()
    assert scalarizer.observe is not None
    state = scalarizer.init(vec(LB))
    for before, after in draws(60, 3).reshape(30, 2, 3):
        state = both(scalarizer, state, peer, before)
        state = scalarizer.observe(after, state)
        peer.update(after)
        torch.testing.assert_close(state.logits, peer._w.detach(), rtol=1e-9, atol=1e-12)


def test_random_has_the_distribution_of_softmax_of_normals():
    scalarizer, n = sc.random(), 20_000
    keys = jd.random.split(jd.random.key(5), n)
    ours = vmap(lambda key: gradient(scalarizer, vec(LB), scalarizer.init(vec(LB), key=key)))(keys)
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(n, 3, generator=generator, dtype=torch.float64).softmax(-1)
    assert_close(ours.mean(0), [1 / 3, 1 / 3, 1 / 3], atol=5 * 0.17 / math.sqrt(n))
    torch.testing.assert_close(ours.T.cov(), theirs.T.cov(), rtol=0, atol=2e-3)
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(
        ours[:, 0].quantile(quantiles), theirs[:, 0].quantile(quantiles), rtol=0, atol=1e-2
    )


def test_random_draws_anew_at_every_call():
    scalarizer = sc.random()
    state = scalarizer.init(vec(LB), key=jd.random.key(1))
    seen = []
    for _ in range(5):
        loss, state = scalarizer(vec(LB), state)
        assert 1.0 <= float(loss) <= 4.0
        seen.append(float(loss))
    assert len(set(seen)) == 5


# Identities


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


# Closed forms where part of the formula is held constant


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


# Edges


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
    assert int(twice.step) == int(once.step) == 1


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
    assert int(given.step) == 0


def test_dwa_at_a_zero_average():
    zero = vec([0.0, 0.0])
    step = torch.tensor(0)
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
    assert_close(gradient(scalarizer, vec(LA), state), [0.0, 0.0], atol=0)


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
