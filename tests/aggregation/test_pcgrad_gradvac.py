"""Known numbers and edge cases of PCGrad and GradVac, and a loop over rows."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.helpers import assert_numbers, row_weights, vector_of, weigh
from tests.matrices import A, B, C, all_matrices
from torchjd_func.aggregation._orders import shuffled_others

OPPOSITE = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
cases = pytest.mark.parametrize(("name", "jac"), all_matrices(), ids=[n for n, _ in all_matrices()])


def test_pcgrad():
    assert_numbers(row_weights(jd.pcgrad(), A), [2.22222222, 1.57894737])
    assert_numbers(vector_of(jd.pcgrad(), A), [0.58479532, 3.80116959, 3.80116959])
    assert_numbers(2 * vector_of(jd.pcgrad(reduction="mean"), A), vector_of(jd.pcgrad(), A))
    assert_numbers(vector_of(jd.pcgrad(), OPPOSITE), [0.0, 0.0])


def test_pcgrad_outcomes_are_equally_likely():
    keys = jd.random.split(jd.random.key(1), 4000)

    def draw(jac):
        aggregator = jd.pcgrad()
        return vmap(lambda key: weigh(aggregator, jac, aggregator.init(jac, key=key))[0])(keys)

    outcomes, counts = draw(B).mul(1e6).round().unique(dim=0, return_counts=True)
    first, second = (24 / 11, 2.0), (17 / 11, 1.5)
    want = torch.tensor([[a, b, 14 / 11] for a in first for b in second], dtype=torch.float64)
    assert_numbers(outcomes / 1e6, _sorted(want), tol=2e-6)
    assert (counts - 1000).abs().max() < 120  # four standard deviations
    mean = draw(C).mean(0)
    torch.testing.assert_close(
        mean, torch.tensor([3.1, 1.79351351, 1.55135135]).double(), rtol=0.02, atol=0
    )


def _sorted(rows):
    return rows[sorted(range(len(rows)), key=lambda i: rows[i].tolist())]


def test_pcgrad_never_visits_its_own_gradient():
    jac = torch.tensor([[0.0, 0, -1], [2, -1, -1], [-1, 0, 2]], dtype=torch.float64)
    for seed in range(12):
        assert_numbers(row_weights(jd.pcgrad(), jac, seed)[2], 2.2)


@pytest.mark.parametrize("m", [2, 4])
def test_orders_are_uniform_over_the_others(m):
    keys = jd.random.split(jd.random.key(3), 6000)
    orders = vmap(lambda key: shuffled_others(key, m))(keys)
    assert orders.shape == (6000, m, m - 1)
    for i in range(m):
        assert torch.equal(
            orders[:, i].sort(-1).values.unique(dim=0),
            torch.tensor([[j for j in range(m) if j != i]], dtype=torch.int64),
        )
    if m == 4:
        for i in range(m):
            _, counts = orders[:, i].unique(dim=0, return_counts=True)
            assert len(counts) == 6
            assert (counts - 1000).abs().max() < 120
        _, counts = orders[:, :2].flatten(1).unique(dim=0, return_counts=True)
        assert len(counts) == 36  # rows are drawn independently


@pytest.mark.parametrize("seed", range(2))
@cases
def test_surgery_equals_loop_over_rows(name, jac, seed):
    key = jd.random.key(seed)
    aggregator = jd.gradvac(0.3)
    state = aggregator.init(jac, key=key)
    want_phi = state.phi
    for step in range(3):
        current = jac + 0.1 * step * jac.flip(-1)
        orders = shuffled_others(jd.random.split(state.key)[1], len(jac))
        got, state = aggregator(current, state)
        want, want_phi = oracles.surgery(current, orders, want_phi, 0.3)
        scale = float(current.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * scale)
        torch.testing.assert_close(state.phi, want_phi, rtol=1e-6, atol=1e-6)
    orders = shuffled_others(jd.random.split(key)[1], len(jac))
    got, (want, _) = vector_of(jd.pcgrad(), jac, seed), oracles.surgery(jac, orders)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12 * float(jac.abs().max()))


def test_gradvac():
    aggregator = jd.gradvac(0.5)
    state = aggregator.init(A, key=jd.random.key(0))
    wanted = [
        ([2.22222222, 1.57894737], -0.42059551),
        ([1.85798780, 1.40641528], -0.63089327),
        ([1.58335643, 1.27632673], None),
    ]
    for want, phi in wanted:
        got, state = weigh(aggregator, A, state)
        assert_numbers(got, want)
        if phi is not None:
            assert_numbers(state.phi, [[0.0, phi], [phi, 0.0]])


def test_gradvac_raises_cosines_to_their_averages():
    aggregator = jd.gradvac(0.5)
    rows = [[[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-0.6, 0.8]]]
    wanted = [(1.0, 0.3), (1.31448544, 0.15), (1.72137320, -0.225)]
    state = aggregator.init(torch.eye(2).double(), key=jd.random.key(0))
    for row, (weight, phi) in zip(rows, wanted, strict=True):
        jac = torch.tensor(row, dtype=torch.float64)
        got, state = weigh(aggregator, jac, state)
        assert_numbers(got, [weight, weight])
        assert_numbers(state.phi[0, 1], phi)


def test_gradvac_edge_cases():
    aggregator = jd.gradvac(1.0)
    state = aggregator.init(A, key=jd.random.key(0))
    parallel = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    _, state = weigh(aggregator, parallel, state)
    assert_numbers(state.phi, [[0.0, 1.0], [1.0, 0.0]], tol=1e-12)
    got, _ = weigh(aggregator, A, state)  # a target of 1 is out of reach
    assert torch.isfinite(got).all()
    zero_row = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    got, later = weigh(aggregator, zero_row, state)
    assert_numbers(got, [1.0, 1.0])
    assert_numbers(later.phi[0, 1], 0.0)
    unmoved = jd.gradvac(0.0)
    state = unmoved.init(A, key=jd.random.key(0))
    assert_numbers(weigh(unmoved, A, state)[1].phi, torch.zeros(2, 2))
