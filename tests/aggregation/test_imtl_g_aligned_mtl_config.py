"""Known numbers and edge cases of IMTL-G, Aligned-MTL, ConFIG and its momentum variant."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.helpers import assert_numbers, assert_trees_close, compiled, row_weights, vector_of
from tests.matrices import A, B, C, E, K, matrix

OPPOSITE = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)


def test_imtl_g():
    assert_numbers(row_weights(jd.imtl_g(), A), [0.59233032, 0.40766968])
    assert_numbers(vector_of(jd.imtl_g(), A), [0.07669683, 1.0, 1.0])
    assert_numbers(row_weights(jd.imtl_g(), B), [0.53437067, 0.26718533, 0.19844400])
    assert_numbers(vector_of(jd.imtl_g(), B), [0.33592666, 0.33592666, 0.59533201])
    assert_numbers(row_weights(jd.imtl_g(), C), [-0.41404255, -0.49354612, 1.90758867])
    assert_numbers(vector_of(jd.imtl_g(), OPPOSITE), [-5.0, 0.0])


def test_imtl_g_can_go_uphill_and_the_safe_variant_cannot():
    assert_numbers(row_weights(jd.imtl_g(), E), [4.679344, -1.929721, -1.749622], tol=1e-6)
    uphill = E @ vector_of(jd.imtl_g(), E)
    assert_numbers(uphill, [-1.1098206, -3.5095608, -1.5695233])
    assert_numbers(E @ vector_of(jd.imtl_g(safe=True), E), -uphill)
    assert_numbers(vector_of(jd.imtl_g(safe=True), B), vector_of(jd.imtl_g(), B))


def test_imtl_g_edge_cases():
    antiparallel = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert_numbers(row_weights(jd.imtl_g(), antiparallel), [0.0, 0.0])
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    assert_numbers(row_weights(jd.imtl_g(), zero_row), [0.59233032, 0.40766968, 0.0])
    sizes = torch.tensor([[1e-6], [1e6]], dtype=torch.float64)
    got = row_weights(jd.imtl_g(), sizes * A) * sizes.squeeze() * A.norm(dim=1)
    assert_numbers(got[0] / got[1], 1.0, tol=1e-9)  # equal projections, whatever the norms


def _flat(height: float) -> torch.Tensor:
    """Return four unit rows of sum zero that are nearly on one line, turned in five dimensions."""
    c = (1 - height**2) ** 0.5
    rows = [[c, height, 0], [c, -height, 0], [-c, 0, height], [-c, 0, -height]]
    turn = torch.linalg.qr(matrix("gaussian", 5, 5)).Q[:3]
    return torch.tensor(rows, dtype=torch.float64) @ turn


@pytest.mark.parametrize("decades", [0, 1, 2, 3, 4, 5])
def test_what_balances_to_zero_gives_no_direction_however_ill_conditioned(decades):
    rows = _flat(10.0**-decades * 0.5)
    for turned in (rows, 3 * rows, rows[[2, 0, 3, 1]]):
        assert_numbers(vector_of(jd.imtl_g(), turned), torch.zeros(5), tol=0.0)
        scaled = turned * torch.tensor([[1.0], [0.2], [30.0], [4.0]], dtype=torch.float64)
        assert_numbers(vector_of(jd.config(), scaled), torch.zeros(5), tol=0.0)
    for m, n in ((3, 2), (5, 3), (6, 5)):
        for seed in range(5):
            scale = torch.logspace(0, -decades, n, dtype=torch.float64)
            rows = matrix("gaussian", m, n, seed) * scale
            rows = rows - rows.mean(0)
            for factor in (1.0, 3.0):
                assert_numbers(vector_of(jd.imtl_g(), factor * rows), torch.zeros(n), tol=0.0)


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 0.0])
def test_what_is_nearly_equal_is_no_rounding(noise):
    for m in (2, 3, 5, 16):
        rows = matrix("gaussian", 1, 8) + noise * matrix("gaussian", m, 8, seed=1)
        for rule, factor in ((jd.imtl_g(), 1), (jd.config(), m)):
            gap = vector_of(rule, rows) / factor - rows.mean(0)
            assert gap.norm() <= 0.2 * rows.mean(0).norm()


@pytest.mark.parametrize(
    ("scale", "want_a", "want_b"),
    [
        ("min", [0.55907192, 0.40826107], [0.22039642, 0.24317125, 0.43343946]),
        ("median", [0.55907192, 0.40826107], [0.43749903, 0.48270831, 0.86040117]),
        ("rmse", [1.51086564, 1.10330640], [0.54051562, 0.59637020, 1.06299728]),
    ],
)
def test_aligned_mtl(scale, want_a, want_b):
    assert_numbers(row_weights(jd.aligned_mtl(scale=scale), A), want_a)
    assert_numbers(vector_of(jd.aligned_mtl(scale=scale), B), want_b)
    added = row_weights(jd.aligned_mtl(torch.ones(3), scale), B)
    assert_numbers(added, 3 * row_weights(jd.aligned_mtl(scale=scale), B))


def test_aligned_mtl_preference_rank_and_edges():
    assert_numbers(row_weights(jd.aligned_mtl([0.7, 0.3]), A), [0.64998714, 0.37767019])
    assert_numbers(row_weights(jd.aligned_mtl(), C), [-0.04966311, 0.02069620, 0.10097649])
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    got = row_weights(jd.aligned_mtl(), zero_row)
    assert_numbers(got, [*(2 / 3 * row_weights(jd.aligned_mtl(), A)), 0.0])
    assert_numbers(row_weights(jd.aligned_mtl([0.7]), A[:1]), [0.7])
    assert_numbers(row_weights(jd.aligned_mtl(), 0 * A), [0.5, 0.5])
    assert_numbers(vector_of(jd.aligned_mtl(), torch.stack([A[0], -A[0]])), [0.0, 0.0, 0.0])


def test_aligned_mtl_takes_the_lower_median():
    jac = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
    assert_numbers(vector_of(jd.aligned_mtl(scale="median"), jac), torch.full((4,), 2.0 / 4))


def test_config():
    assert_numbers(vector_of(jd.config(), A), [0.15880898, 2.07060676, 2.07060676])
    assert_numbers(vector_of(jd.config(), B), [1.22874270, 1.22874270, 2.17758797])
    assert_numbers(vector_of(jd.config(), C), [0.47004399, -2.30192046])
    assert_numbers(vector_of(jd.config([2.0, 1.0]), A), [-0.11884998, 1.93492639, 1.93492639])
    assert_numbers(vector_of(jd.config([2.0, 1.0, 1.0]), B), [1.55123246, 0.77561623, 1.63309224])


def test_config_scales_no_rounding():
    assert_numbers(vector_of(jd.config(), OPPOSITE), [0.0, 0.0], tol=0.0)
    for seed in range(20):
        row = matrix("gaussian", 1, 50, seed=seed)
        rounded = torch.cat([row, -row / 3])
        assert_numbers(vector_of(jd.config(), rounded), torch.zeros(50), tol=0.0)
        got = vector_of(jd.config(), rounded.float())
        assert torch.equal(got, torch.zeros(50))


def test_config_zero_and_parallel_rows():
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    assert_numbers(vector_of(jd.config(), zero_row), vector_of(jd.config(), A))
    parallel = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    assert_numbers(vector_of(jd.config(), parallel), [4.0, 0.0])


@pytest.mark.parametrize("length", ["min", "max", "arithmetic", "geometric", "harmonic"])
def test_config_lengths(length):
    norms = K[:3].norm(dim=1)
    common = {
        "min": norms.min(),
        "max": norms.max(),
        "arithmetic": norms.mean(),
        "geometric": norms.prod() ** (1 / 3),
        "harmonic": 3 / (1 / norms).sum(),
    }[length]
    got, unit = vector_of(jd.config(length=length), K[:3]), vector_of(jd.config(), K[:3])
    unit = unit / unit.norm()
    assert_numbers(got, common * (K[:3] / norms[:, None] @ unit).sum() * unit)
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    assert torch.isfinite(vector_of(jd.config(length=length), zero_row)).all()


@pytest.mark.parametrize("length", ["min", "geometric", "harmonic"])
def test_config_lengths_vanish_with_a_row(length):
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    assert_numbers(vector_of(jd.config(length=length), zero_row), torch.zeros(3), tol=0.0)


@pytest.mark.parametrize("visit", ["cyclic", "all"])
def test_config_momentum_equals_loop(visit):
    m, n, calls = 3, 5, 10
    jacs = [matrix("gaussian", m, n, seed=seed) for seed in range(calls)]
    aggregator = jd.config_momentum(0.8, 0.99, visit=visit)
    state = aggregator.init(jacs[0])
    if visit == "cyclic":
        want = oracles.config_momentum(
            [(t % m, jacs[t][t % m]) for t in range(calls)], m, 0.8, 0.99
        )
        assert not want[m - 2].any()
        assert want[m - 1].any()
    else:
        want = [oracles.config(jacs[0], torch.ones(m).double()).sign()]
    for t, target in enumerate(want):
        got, state = aggregator(jacs[t], state)
        torch.testing.assert_close(got, target, rtol=1e-6, atol=1e-6)


def test_config_momentum_reads_only_the_row_whose_turn_it_is():
    jac = matrix("gaussian", 3, 4)
    aggregator = jd.config_momentum()
    full = single = aggregator.init(jac)
    for t in range(7):
        current = jac * (t + 1)
        want, full = aggregator(current, full)
        got, single = aggregator(current[single.step % 3].expand(3, 4), single)
        assert torch.equal(got, want)
        assert int(single.step) == t + 1


def test_config_momentum_is_adam_for_one_objective():
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([x], lr=1.0)
    aggregator = jd.config_momentum()
    state = aggregator.init(torch.zeros(1, 4, dtype=torch.float64))
    for seed in range(6):
        row = matrix("gaussian", 1, 4, seed=seed)
        before = x.detach().clone()
        x.grad = row[0]
        optimizer.step()
        got, state = aggregator(row, state)
        assert_numbers(got, before - x.detach(), tol=1e-6)


def test_config_momentum_in_turn_is_one_graph_and_can_be_mapped():
    aggregator, jac = jd.config_momentum(), matrix("gaussian", 3, 4)
    fast, counter = compiled(aggregator)
    eager = graph = aggregator.init(jac)
    want = jac
    for t in range(4):
        want, eager = aggregator(jac * (t + 1), eager)
        got, graph = fast(jac * (t + 1), graph)
        assert_trees_close((got, graph), (want, eager))
    assert counter.graphs == 1
    assert want.any()

    def last(jac):
        state = aggregator.init(jac)
        for scale in (1.0, 2.0, -1.0, 3.0):
            grads, state = aggregator(scale * jac, state)
        return grads

    batch = torch.stack([jac, jac.flip(0), 0 * jac])
    assert_numbers(vmap(last)(batch), torch.stack([last(jac) for jac in batch]))
    assert not last(0 * jac).any()
