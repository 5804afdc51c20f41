"""Golden numbers, identities and parity of PCD."""

import pytest
import torch
import torchjd.aggregation as peer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_trees_close
from tests.matrices import A2, A, B, C, jacobians, matrix
from tests.values import close, rows, weights_of

GAUSSIAN = [matrix("gaussian", m, n, seed=m * n) for m, n in ((2, 3), (3, 5), (4, 9), (6, 20))]


@pytest.mark.parametrize(
    ("tau", "jac", "want"),
    [
        (0.0, A, [-0.97332853, 2.91998558, 2.91998558]),
        (0.02, A, [-0.82003275, 2.94342881, 2.94342881]),
        (0.5, A, [2.08890002, 2.61117758, 2.61117758]),
        (0.5, B, [0.53822670, 0.39334352, 0.74538104]),
        (0.02, C, [-0.83163161, -2.07566588]),
        (0.0, C, [0.0, 0.0]),
        (0.1, rows([1.0, 1.0], [1.0, 0.0], [-1.0, 0.0]), [1.0, 1.0]),  # constraints exclude
    ],
)
def test_pcd_values(tau, jac, want):
    close(jd.pcd(tau)(jac)[0], want, 8)


def test_pcd_weights_and_state():
    close(weights_of(jd.pcd(0.0), A), [1.84932420, 1.07066138], 8)
    close(weights_of(jd.pcd(0.5), B), [0.78668705, 0.32090194, 0.24846035], 8)
    aggregator = jd.pcd(0.1, beta=0.9)
    state = aggregator.init(A)
    weights = [[1.81848945, 1.17796671], [1.81848945, 1.17796671], [1.35497766, 0.77159732]]
    averages = [[1.8, 3.8], [8.82, 18.62], [9.338, 19.358]]
    for jac, want, average in zip((A, 2 * A, A2), weights, averages, strict=True):
        assert aggregator.weighting is not None
        found, state = aggregator.weighting(jac @ jac.mT, state)
        close(found, want, 8)
        close(state.ema, average, 12)
    assert state.visits.tolist() == [3, 3]


@pytest.mark.parametrize("jac", GAUSSIAN)
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
def test_pcd_agrees_with_the_peer_over_steps(jac, tau):
    theirs, ours = peer.PCD(tau, beta=0.9), jd.pcd(tau, beta=0.9)
    state = ours.init(jac)
    for scale in (1.0, 3.0, -0.2):
        got, state = ours(jac * scale + 0.1, state)
        torch.testing.assert_close(got, theirs(jac * scale + 0.1), rtol=1e-8, atol=1e-8)


def test_pcd_agrees_with_the_peer_on_more_rows_than_columns():
    dropped = 0
    for seed in range(40):
        jac = matrix("gaussian", 5, 3, seed=seed)
        for tau in (0.0, 0.3):
            got, want = jd.pcd(tau)(jac)[0], peer.PCD(tau)(jac)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
            dropped += bool(torch.allclose(got, jac[0], rtol=1e-6))
    assert 0 < dropped < 40


def test_pcd_takes_one_tau_for_each_secondary_objective():
    taus = torch.tensor([0.1, 0.6], dtype=torch.float64)
    want = peer.PCD(taus)(B)
    for tau in (taus, [0.1, 0.6]):
        torch.testing.assert_close(jd.pcd(tau)(B)[0], want, rtol=1e-7, atol=1e-8)
    got = vmap(lambda tau: jd.pcd(tau)(B)[0])(torch.tensor([0.0, 0.5], dtype=torch.float64))
    close(got[1], [0.53822670, 0.39334352, 0.74538104], 8)


@given(jacobians(min_n=6, kinds=("gaussian",)), st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_pcd_does_not_see_the_scales_of_secondary_rows(jac, seed):
    scales = 10 ** jd.random.normal(jd.random.key(seed), (len(jac), 1)).double().clamp(-2, 2)
    scales = torch.cat([torch.ones(1, 1, dtype=torch.float64), scales[1:]])
    aggregator = jd.pcd(0.3, eps=0.0)
    want = aggregator(jac)[0]
    torch.testing.assert_close(aggregator(scales * jac)[0], want, rtol=1e-6, atol=1e-7)
    assert float((jd.pcd(0.3)(scales * jac)[0] - want).norm()) < 1e-3 * float(want.norm())


def test_pcd_follows_the_primary_gradient_where_nothing_conflicts():
    jac = matrix("gaussian", 4, 6).abs()
    close(jd.pcd(0.0)(jac)[0], jac[0], 12)


@given(jacobians(min_m=2, min_n=6, kinds=("gaussian",)))
@settings(deadline=None, max_examples=20)
def test_pcd_meets_its_constraints(jac):
    unit = jac / jac.norm(dim=-1, keepdim=True)
    weights = weights_of(jd.pcd(0.3, eps=0.0), jac)
    # The direction before it is given the length of the primary gradient.
    projected = jac.mT @ weights / (weights[0] * jac[0].norm())
    assert (unit[1:] @ projected >= 0.3 - 1e-7).all()


def test_pcd_edge_cases():
    zero_primary = torch.cat([0 * B[:1], B[1:]])
    aggregator = jd.pcd()
    got, state = aggregator(zero_primary)
    assert torch.equal(got, torch.zeros(3, dtype=torch.float64))
    assert (state.ema[1:] > 0).all()
    zero_secondary = torch.cat([A, 0 * A[:1]])
    close(jd.pcd(0.5)(zero_secondary)[0], [2.08890002, 2.61117758, 2.61117758], 8)
    got, later = aggregator(torch.full_like(B, torch.nan), state)
    assert got.isnan().all()
    assert_trees_close(later, state, rtol=0, atol=0)
