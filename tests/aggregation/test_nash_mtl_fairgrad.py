"""Golden numbers, identities and parity of Nash-MTL and FairGrad."""

import math

import pytest
import torch
import torchjd.aggregation as peer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import torchjd_func as jd
from tests.matrices import A2, A, B, C, jacobians, matrix
from tests.values import close, rows, sequence, weights_of

GAUSSIAN = [matrix("gaussian", m, n, seed=m * n) for m, n in ((2, 3), (3, 5), (4, 9), (6, 20))]
ALPHAS = (0.5, 1.0, 2.0, 5.0)


def test_nash_mtl_values():
    close(weights_of(jd.nash_mtl(), A), [0.59146115, 0.40707148], 8)
    close(jd.nash_mtl()(A)[0], [0.07658428, 0.99853264, 0.99853264], 8)
    close(jd.nash_mtl(max_norm=1.0)(A)[0], [0.05415326, 0.70606920, 0.70606920], 8)
    close(weights_of(jd.nash_mtl(), B), [1.24070329, 0.62035165, 0.43470882], 8)
    close(jd.nash_mtl()(B)[0], [0.80599448, 0.80599448, 1.30412646], 8)
    parallel = rows([1.0, 0.0], [3.0, 0.0])
    close(weights_of(jd.nash_mtl(), parallel), [0.70710678, 0.23570226], 8)
    close(jd.nash_mtl()(parallel)[0], [math.sqrt(2), 0.0], 12)
    close(weights_of(jd.nash_mtl(), rows([1.0, 2.0], [1.0, 2.0])), [10**-0.5] * 2, 12)


@pytest.mark.parametrize(
    ("alpha", "jac", "want"),
    [
        (0.5, A, [0.74282825, 0.52539261]),
        (2.0, A, [0.47136292, 0.31945423]),
        (5.0, A, [0.37594160, 0.25231046]),
        (0.5, B, [1.21979468, 0.73571905, 0.54770607]),
        (2.0, B, [1.25388472, 0.52534239, 0.36084414]),
    ],
)
def test_fairgrad_values(alpha, jac, want):
    close(weights_of(jd.fairgrad(alpha), jac), want, 8)


def test_fairgrad_directions():
    close(jd.fairgrad(2.0)(A)[0], [0.03127368, 0.79081715, 0.79081715], 8)
    close(jd.fairgrad(2.0)(B)[0], [0.89304058, 0.68984065, 1.08253243], 8)


@given(jacobians(kinds=("gaussian", "tiny", "duplicate")), st.sampled_from(ALPHAS))
@settings(deadline=None, max_examples=25)
def test_fairgrad_solves_its_equation(jac, alpha):
    gramian = jac @ jac.mT
    solution = jd.linalg.orthant_root(gramian, alpha, max_iter=40)
    nearest = jd.mgda()(jac / jac.norm(dim=-1, keepdim=True))[0].norm()
    if float(nearest) > 1e-3:  # well away from stationary
        assert solution.converged and (solution.value > 0).all()
        progress = gramian @ solution.value
        close(progress * solution.value ** (1 / alpha), torch.ones(len(jac)))
        length = (solution.value @ gramian @ solution.value).reshape(1)
        close(length / (solution.value ** (1 - 1 / alpha)).sum(), torch.ones(1))


@given(jacobians(kinds=("gaussian", "tiny", "scaled")))
@settings(deadline=None, max_examples=25)
def test_nash_mtl_is_fairgrad_of_one_and_has_length_root_m(jac):
    weights = weights_of(jd.nash_mtl(), jac)
    close(weights_of(jd.fairgrad(1.0), jac), weights)
    if float(jd.mgda()(jac / jac.norm(dim=-1, keepdim=True))[0].norm()) > 1e-3:
        direction = jd.nash_mtl()(jac)[0]
        close(direction.norm(), len(jac) ** 0.5)
        close(weights * (jac @ direction), torch.ones(len(jac)))


@given(jacobians(min_n=6, kinds=("gaussian",)), st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_nash_mtl_does_not_see_the_lengths_of_rows(jac, seed):
    scales = 10 ** (6 * jd.random.uniform(jd.random.key(seed), (len(jac), 1)).double() - 3)
    close(jd.nash_mtl()(scales * jac)[0], jd.nash_mtl()(jac)[0])
    close(weights_of(jd.nash_mtl(), scales * jac) * scales[:, 0], weights_of(jd.nash_mtl(), jac))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_weights_follow_the_scale_of_the_rows(alpha, scale):
    want = scale ** (-2 * alpha / (1 + alpha)) * weights_of(jd.fairgrad(alpha), B)
    close(weights_of(jd.fairgrad(alpha), scale * B) / want, torch.ones(3), 12)


def test_nash_mtl_of_two_rows_is_their_bisector():
    unit = A / A.norm(dim=-1, keepdim=True)
    bisector, direction = unit.sum(0), jd.nash_mtl()(A)[0]
    close(direction / direction.norm(), bisector / bisector.norm(), 12)
    gramian = A @ A.mT
    ratio = (gramian[0, 0] / gramian[1, 1]).sqrt()
    first = (gramian[0, 0] + gramian[0, 1] * ratio).rsqrt()
    close(weights_of(jd.nash_mtl(), A), torch.stack([first, first * ratio]), 12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_rows_have_a_closed_form(alpha):
    norms = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    want = norms ** (-2 * alpha / (1 + alpha))
    close(weights_of(jd.fairgrad(alpha), torch.diag(norms)), want, 12)


def test_no_root_is_said():
    solution = jd.linalg.orthant_root(torch.stack([C @ C.mT, 0 * C @ C.mT, B @ B.mT]))
    assert solution.converged.tolist() == [False, False, True]
    assert (solution.value[:2] == 0).all()
    assert not solution.fallback.any()
    opposite = rows([1.0, 2.0, 0.0], [-3.0, -6.0, 0.0])
    assert torch.equal(jd.nash_mtl()(opposite)[0], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["zero", "opposite", "low_rank"])
def test_derivatives_are_finite_where_there_is_no_root(kind):
    for rule in (jd.nash_mtl(), jd.fairgrad()):
        for jac in (matrix(kind, 3, 4), torch.zeros(3, 4, dtype=torch.float64)):
            derivative, _ = torch.func.jacrev(rule, has_aux=True)(jac)
            assert derivative.isfinite().all()


def test_zero_rows_are_left_out():
    with_zero = torch.cat([A[:1], 0 * A[:1], A[1:]])
    solution = jd.linalg.orthant_root(with_zero @ with_zero.mT, 2.0)
    assert solution.converged
    close(solution.value, [0.47136292, 0.0, 0.31945423], 8)


def test_iterations_are_counted_and_bounded():
    assert 0 < int(jd.linalg.orthant_root(B @ B.mT).iterations) < 12
    batch = torch.stack([B @ B.mT, torch.eye(3, dtype=B.dtype)])
    solution = jd.linalg.orthant_root(batch, 5.0, max_iter=1)
    assert solution.converged.tolist() == [False, True]
    assert solution.value[0].isnan().all()
    assert solution.value[1].isfinite().all()


def test_a_root_that_is_not_reached_is_not_a_number():
    lengths = 10 ** torch.linspace(-12, 12, 5, dtype=torch.float64)
    jac = lengths[:, None] * matrix("gaussian", 5, 8)
    for rule in (jd.fairgrad(5.0, max_iter=3), jd.pivrg(torch.ones(5), alpha=5.0, max_iter=3)):
        assert rule(jac)[0].isnan().all()
    assert jd.fairgrad(5.0, max_iter=200)(jac)[0].isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
@given(jac=jacobians(min_n=6, kinds=("gaussian",)), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_preference_is_the_power_in_the_bargain(alpha, jac, seed):
    powers = 0.1 + jd.random.uniform(jd.random.key(seed), (len(jac),), dtype=torch.float64)
    weights = weights_of(jd.fairgrad(alpha, preference=powers), jac)
    gains = jac @ (jac.mT @ weights)
    close(gains * (weights / powers) ** (1 / alpha), torch.ones(len(jac)))
    bargain = jd.nash_mtl(preference=powers)(jac)[0]
    close(bargain.square().sum(), powers.sum())
    close(weights_of(jd.nash_mtl(preference=2 * powers), jac), 2**0.5 * powers_of(jac, powers))


def powers_of(jac, powers):
    return weights_of(jd.nash_mtl(preference=powers), jac)


def test_preference_of_ones_is_none():
    for rule in (jd.nash_mtl, jd.fairgrad):
        close(weights_of(rule(preference=[1.0, 1.0, 1.0]), B), weights_of(rule(), B), 12)
    with pytest.raises(ValueError, match=r"`preference` must be in \(0, inf\)"):
        jd.nash_mtl(preference=[0.0, 1.0])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0])
def test_extreme_lengths_converge(alpha):
    batch = torch.stack([matrix("scaled", 5, 8, seed) for seed in range(50)])
    solution = jd.linalg.orthant_root(batch @ batch.mT, alpha, max_iter=80)
    assert solution.converged.all()
    if alpha == 1:
        assert int(solution.iterations.max()) <= 20


def test_alpha_has_a_derivative_and_a_batch():
    alphas = torch.tensor(ALPHAS, dtype=torch.float64)
    want = torch.stack([weights_of(jd.fairgrad(alpha), B) for alpha in ALPHAS])
    gramians = (B @ B.mT).expand(4, 3, 3)
    close(jd.linalg.orthant_root(gramians, alphas, max_iter=40).value, want, 12)
    close(vmap(lambda alpha: weights_of(jd.fairgrad(alpha), B))(alphas), want, 12)
    point = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: weights_of(jd.fairgrad(a), B), (point,))


def test_nash_mtl_keeps_its_weights_between_updates():
    weighting = jd.nash_mtl(update_every=2).weighting
    assert weighting is not None
    grams = [A @ A.mT, 4 * A @ A.mT, A2 @ A2.mT, A @ A.mT]
    found = sequence(weighting, grams)
    close(found[1], found[0], 12)
    close(found[2], weights_of(jd.nash_mtl(), A2), 12)
    close(found[3], found[2], 12)


def test_nash_mtl_clips_reused_weights_by_their_own_length():
    aggregator = jd.nash_mtl(max_norm=1.0, update_every=3)
    state = aggregator.init(A)
    for jac in (A, 0.1 * A, 10 * A):
        direction, state = aggregator(jac, state)
        assert float(direction.norm()) <= 1 + 1e-12


def test_fairgrad_agrees_with_the_peer():
    for jac in GAUSSIAN:
        for alpha in (0.5, 1.0, 2.0):
            theirs = peer.FairGrad(alpha)(jac)
            torch.testing.assert_close(jd.fairgrad(alpha)(jac)[0], theirs, rtol=1e-3, atol=1e-4)


def test_the_peer_returns_huge_weights_where_there_is_no_solution_and_we_do_not():
    theirs = peer.FairGradWeighting(1.0)(C @ C.mT)
    assert theirs.max() > 100
    assert torch.equal(jd.fairgrad()(C)[0], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("make", [jd.nash_mtl, jd.fairgrad, lambda: jd.fairgrad(2.0)])
def test_nearly_stationary_rows_give_numbers(make):
    for seed in range(20):
        rows = matrix("gaussian", 4, 6, seed)
        noise = 10.0 ** -(3 + seed % 6) * matrix("gaussian", 4, 6, seed + 100)
        jac = torch.cat([-rows[1:].sum(0, keepdim=True), rows[1:]]) + noise
        direction = make()(jac)[0]
        assert (jac @ direction >= -1e-9 * jac.norm(dim=1) * direction.norm()).all()
