"""Numbers of the methods that remember gradients: ExcessMTL, MoCo and DB-MTL."""

import math

import pytest
import torch
import torchjd.aggregation as peer

import torchjd_func as jd
from tests.helpers import close, double
from tests.matrices import A2, A, B, matrix
from tests.oracles import project_simplex

LOSSES_A = torch.tensor([1.0, 2.0], dtype=torch.float64)


# Excess risks


def test_excess_mtl_values():
    rule, state = jd.excess_mtl(), None
    scaled = A * double([0.5], [1.5])
    for jac, weights in ((A, [0.5, 0.5]), (A, [0.5, 0.5]), (scaled, [0.28399233, 0.71600767])):
        grads, state = rule(jac, state)
        close(state.log_weights.exp(), weights)
        close(grads, jac.T @ double(*weights))


@pytest.mark.parametrize("n_warmup_steps", [0, 1, 3])
@pytest.mark.parametrize("kind", ["gaussian", "scaled", "zero"])
def test_excess_mtl_of_a_constant_jacobian_stays_uniform(kind, n_warmup_steps):
    jac = matrix(kind, 4, 5)
    rule = jd.excess_mtl(0.5, n_warmup_steps)
    state = rule.init(jac)
    for _ in range(6):
        _, state = rule(jac, state)
        alive = state.log_weights[jac.norm(dim=1) > 0]
        close(alive, alive[0].expand_as(alive), atol=1e-9)
    steps = torch.arange(1, max(n_warmup_steps, 1) + 1, dtype=torch.float64)
    torch.testing.assert_close(state.baseline, jac.abs().sum(dim=1) * steps.rsqrt().mean())


@pytest.mark.parametrize("n_warmup_steps", [1, 2, 4])
def test_excess_mtl_equals_the_peer_after_a_warm_up(n_warmup_steps):
    ours, theirs = jd.excess_mtl(0.7, n_warmup_steps, eps=1e-7), peer.ExcessMTL(0.7, n_warmup_steps)
    state = None
    for seed in range(7):
        jac = 100 * matrix("gaussian", 3, 6, seed)  # the peer adds 1e-7 to the baseline
        got, state = ours(jac, state)
        torch.testing.assert_close(got, theirs(jac), rtol=1e-8, atol=1e-8)


def test_excess_mtl_eps_is_under_the_root():
    _, state = jd.excess_mtl(eps=2.0)(A)
    close(state.baseline, (A.square() / (A.square() + 2).sqrt()).sum(dim=1))


def test_excess_mtl_first_step_of_the_peer_is_raw():
    ours, theirs, state = jd.excess_mtl(eps=1e-7), peer.ExcessMTL(), None
    close(theirs(A), A.T @ double(0.11920292, 0.88079708))
    got, state = ours(A)
    close(got, A.mean(dim=0))
    raw = torch.log_softmax(A.abs().sum(dim=1), dim=0)
    got, _ = ours(A2, state._replace(log_weights=raw))
    close(got, theirs(A2), atol=1e-6)


def test_excess_mtl_gives_a_late_task_its_own_baseline():
    rule = jd.excess_mtl()
    late = torch.cat([A, torch.zeros_like(A[:1])])
    _, state = rule(late)
    grads, state = rule(torch.cat([A, A2[:1]]), state)
    assert torch.isfinite(grads).all()
    close(state.baseline, [6.0, 8.0, 6.0])
    relative = double(math.sqrt(0.5), math.sqrt(0.5), 1.0)
    close(state.log_weights.exp(), torch.softmax(relative, dim=0))


def test_excess_mtl_does_not_see_the_scale_of_the_gradients():
    for s in (1e-6, 1e6):
        rule, state, scaled = jd.excess_mtl(), None, None
        for seed in range(4):
            jac = matrix("gaussian", 3, 5, seed)
            want, state = rule(jac, state)
            got, scaled = rule(s * jac, scaled)
            close(got / s, want, atol=1e-12)


@pytest.mark.parametrize("s", [1e-35, 1e30])
def test_excess_mtl_of_float32_squares_no_entry(s):
    rule, state, scaled = jd.excess_mtl(eps=0.0), None, None
    for seed in range(4):
        jac = matrix("zero", 3, 5, seed)
        want, state = rule(jac, state)
        got, scaled = rule((s * jac).float(), scaled)
        close(got.double() / s, want, atol=1e-4)


# MoCo


def moco_loop(jacs, beta, gamma, rho, sigmas):
    """Follow the formulas with projections by the oracle of the simplex."""
    m = len(jacs[0])
    tracked, weights = torch.zeros_like(jacs[0]), torch.full((m,), 1 / m, dtype=torch.float64)
    directions = []
    for t, jac in enumerate(jacs, start=1):
        tracked = tracked - beta * t ** -sigmas[0] * (tracked - jac)
        ridge = tracked @ tracked.T + rho * torch.eye(m, dtype=torch.float64)
        weights = project_simplex(weights - gamma * t ** -sigmas[1] * ridge @ weights)
        directions.append(tracked.T @ weights)
    return directions


def test_moco_values():
    rule, state = jd.moco(0.5, 0.01, beta_sigma=0.0, gamma_sigma=0.0), None
    for weights, direction in (
        ([0.5125, 0.4875], [0.4375, 0.5, 0.5]),
        ([0.53710938, 0.46289063], [0.47167969, 0.75, 0.75]),
        ([0.56118469, 0.43881531], [0.33963394, 0.875, 0.875]),
    ):
        grads, state = rule(A, state)
        close(state.weights, weights)
        close(grads, direction)


def test_moco_values_of_the_softmax_form():
    rule, state = jd.moco(simplex="softmax", prescale=True), None
    for weights, direction in (
        ([0.50937390, 0.49062610], [0.23741922, 0.13962035, 0.13962035]),
        ([0.51619168, 0.48380832], [0.30802727, 0.18857414, 0.18857414]),
    ):
        grads, state = rule(A, state, losses=LOSSES_A)
        close(state.weights, weights)
        close(grads, direction)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_moco_equals_a_loop(rho):
    jacs = [matrix("gaussian", 4, 6, seed) for seed in range(6)]
    rule, state = jd.moco(0.8, 0.05, rho, beta_sigma=0.4, gamma_sigma=0.7), None
    for jac, want in zip(jacs, moco_loop(jacs, 0.8, 0.05, rho, (0.4, 0.7)), strict=True):
        got, state = rule(jac, state)
        close(got, want, atol=1e-10)


def test_moco_of_a_constant_jacobian_tends_to_mgda():
    rule, state = jd.moco(0.9, 0.02, beta_sigma=0.0, gamma_sigma=0.0), None
    for _ in range(2000):
        _, state = rule(B, state)
    close(rule(B, state)[0], jd.mgda()(B)[0])


def test_moco_softmax_is_no_projection():
    for simplex, want in (("projection", [0.9, 0.1]), ("softmax", [0.68997448, 0.31002552])):
        rule = jd.moco(gamma=0.0, simplex=simplex)
        _, state = rule(A, rule.init(A)._replace(weights=double(0.9, 0.1)))
        close(state.weights, want)


# DB-MTL


def test_db_mtl_values():
    close(jd.db_mtl(0.0)(A, losses=LOSSES_A)[0], [0.12948320, 1.68824718, 1.68824718])
    rule, state = jd.db_mtl(), None
    for want in ([0.01294832, 0.16882471, 0.16882471], [0.02460181, 0.32076696, 0.32076696]):
        got, state = rule(A, state, losses=LOSSES_A)
        close(got, want)
    got, _ = jd.db_mtl(0.0)(B, losses=double(1.0, 2.0, 0.5))
    close(got, [4.63324942, 4.63324943, 5.99999987])


def test_db_mtl_equals_a_loop():
    rule, state = jd.db_mtl(0.7, sigma=0.5), None
    averages = torch.zeros(3, 5, dtype=torch.float64)
    for k in range(1, 6):
        jac, losses = matrix("gaussian", 3, 5, k), double(0.1, 3.0, 10.0) / k
        beta = 0.7 * k**-0.5
        for i in range(3):
            averages[i] = beta * averages[i] + (1 - beta) * jac[i] / (losses[i] + 1e-8)
        lengths = [float(row.norm()) for row in averages]
        want = max(lengths) * sum(averages[i] / (lengths[i] + 1e-8) for i in range(3))
        got, state = rule(jac, state, losses=losses)
        close(got, want, atol=1e-9)


def test_db_mtl_without_memory_is_parallel_to_the_bisector():
    jac, losses = matrix("gaussian", 2, 5), double(0.2, 7.0)
    got, _ = jd.db_mtl(0.0)(jac, losses=losses)
    bisector = (jac / jac.norm(dim=1, keepdim=True)).sum(dim=0)
    close(torch.cosine_similarity(got, bisector, dim=0), 1.0, atol=1e-9)


def test_db_mtl_does_not_see_the_scale_of_a_loss():
    jac, losses = matrix("gaussian", 3, 5), double(0.2, 7.0, 1.0)
    scale, rule = double(1e-6, 1.0, 1e6), jd.db_mtl(0.5, eps=0.0)
    got, _ = rule(jac * scale[:, None], losses=losses * scale)
    close(got, rule(jac, losses=losses)[0], atol=1e-10)


def test_db_mtl_zero_row_adds_nothing():
    jac = torch.cat([A, torch.zeros_like(A[:1])])
    for eps in (0.0, 1e-8):
        rule = jd.db_mtl(0.0, eps=eps)
        got, _ = rule(jac, losses=double(1.0, 2.0, 3.0))
        close(got, rule(A, losses=LOSSES_A)[0], atol=1e-12)
