"""Known numbers and edge cases of CAGrad, PCGrad, GradVac, IMTL-G, Aligned-MTL and ConFIG."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.matrices import A, B, C, E, K, all_matrices, matrix
from torchjd_func.aggregation._orders import shuffled_others

cases = pytest.mark.parametrize(("name", "jac"), all_matrices(), ids=[n for n, _ in all_matrices()])
OPPOSITE = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
BALANCED = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def close(got, want, tol=1e-7):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def vector(aggregator, jac, seed=0):
    return aggregator(jac, aggregator.init(jac, key=jd.random.key(seed)))[0]


def weigh(aggregator, jac, state):
    return aggregator.weighting(jac @ jac.mT, state)


def weights(aggregator, jac, seed=0):
    return weigh(aggregator, jac, aggregator.init(jac, key=jd.random.key(seed)))[0]


@pytest.mark.parametrize(
    ("jac", "c", "want_weights", "want_vector"),
    [
        (A, 0.4, [0.66329932, 0.5], [0.34680274, 1.16329932, 1.16329932]),
        (A, 0.5, [0.70412415, 0.5], [0.18350342, 1.20412415, 1.20412415]),
        (A, 1.0, [1.2, 0.8], [0.0, 2.0, 2.0]),
        (A, 2.0, [2.00712473, 1.33808315], [0.0, 3.34520788, 3.34520788]),
        (B, 0.5, [0.86037961, 1 / 3, 1 / 3], [0.52704628, 1 / 3, 1.0]),
        (B, 1.0, [1.37097733, 0.42607767, 1 / 3], None),
        (B, 2.0, [2.45457951, 0.74704594, 0.53360424], [1.92097527, 0.96048763, 1.60081271]),
        (C, 0.5, None, [0.02336258, -0.45327486]),
        (C, 2.0, None, [0.0, 0.0]),
    ],
)
def test_cagrad(jac, c, want_weights, want_vector):
    if want_weights is not None:
        close(weights(jd.cagrad(c), jac), want_weights)
    if want_vector is not None:
        close(vector(jd.cagrad(c), jac), want_vector)


def test_cagrad_rescales():
    close(vector(jd.cagrad(rescale="1+c^2"), A), [0.14680273, 0.96329932, 0.96329932])
    close(1.5 * vector(jd.cagrad(rescale="1+c"), A), vector(jd.cagrad(), A))


@pytest.mark.parametrize("c", [0.2, 0.9, 1.5])
@cases
def test_cagrad_reaches_its_dual_bound(name, jac, c):
    gramian, m = jac @ jac.T, len(jac)
    mean = jac.mean(0)
    added = weights(jd.cagrad(c), jac) - 1 / m
    direction = mean + jac.T @ added
    worst = (jac @ direction).min()
    candidates = [jd.linalg.min_norm_point(gramian).value]
    candidates += [added / added.sum()] if added.sum() > 0 else []
    dual = min(w @ gramian.mean(-1) + c * mean.norm() * (jac.T @ w).norm() for w in candidates)
    norms = jac.norm(dim=1)
    scale = norms[norms > 0].min() * mean.norm()
    assert added.min() >= -1e-12
    assert (direction - mean).norm() <= c * mean.norm() * (1 + 1e-7)
    assert worst >= dual - 1e-7 * scale


@pytest.mark.parametrize("c", [0.3, 1.2])
@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (4, 6), (5, 9)])
def test_cagrad_equals_enumeration(shape, c):
    for seed in range(8):
        jac = matrix("gaussian", *shape, seed=seed)
        close(vector(jd.cagrad(c), jac), oracles.cagrad(jac, c), tol=1e-8)


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_cagrad_keeps_what_it_can_where_rows_balance(c):
    close(vector(jd.cagrad(c), BALANCED), [0.0, 1 / 3])
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    close(vector(jd.cagrad(c), zero_row), oracles.dualproj(zero_row))
    tilted = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-0.2, 1.0]], dtype=torch.float64)
    close(vector(jd.cagrad(c), tilted), [0.0, 1 / 3])
    close(vector(jd.cagrad(c), OPPOSITE + 0.0), [0.0, 0.0] if c >= 1 else [-0.25, 0.0])


def test_cagrad_single_objective_and_zero_radius():
    close(vector(jd.cagrad(0.5), A[:1]), 1.5 * A[0])
    close(vector(jd.cagrad(0.0), C), C.mean(0), tol=1e-12)


def test_cagrad_differentiates_in_the_radius():
    slope = torch.func.grad(lambda c: jd.cagrad(c)(A)[0].sum())(torch.tensor(0.5).double())
    step = 1e-5
    high, low = (vector(jd.cagrad(0.5 + s), A).sum() for s in (step, -step))
    close(slope, (high - low) / (2 * step), tol=1e-6)


def test_pcgrad():
    close(weights(jd.pcgrad(), A), [2.22222222, 1.57894737])
    close(vector(jd.pcgrad(), A), [0.58479532, 3.80116959, 3.80116959])
    close(2 * vector(jd.pcgrad(reduction="mean"), A), vector(jd.pcgrad(), A))
    close(vector(jd.pcgrad(), OPPOSITE), [0.0, 0.0])


def test_pcgrad_outcomes_are_equally_likely():
    keys = jd.random.split(jd.random.key(1), 4000)

    def draw(jac):
        aggregator = jd.pcgrad()
        return vmap(lambda key: weigh(aggregator, jac, aggregator.init(jac, key=key))[0])(keys)

    outcomes, counts = draw(B).mul(1e6).round().unique(dim=0, return_counts=True)
    first, second = (24 / 11, 2.0), (17 / 11, 1.5)
    want = torch.tensor([[a, b, 14 / 11] for a in first for b in second], dtype=torch.float64)
    close(outcomes / 1e6, _sorted(want), tol=2e-6)
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
        close(weights(jd.pcgrad(), jac, seed)[2], 2.2)


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
    got, (want, _) = vector(jd.pcgrad(), jac, seed), oracles.surgery(jac, orders)
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
        close(got, want)
        if phi is not None:
            close(state.phi, [[0.0, phi], [phi, 0.0]])


def test_gradvac_raises_cosines_to_their_averages():
    aggregator = jd.gradvac(0.5)
    rows = [[[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-0.6, 0.8]]]
    wanted = [(1.0, 0.3), (1.31448544, 0.15), (1.72137320, -0.225)]
    state = aggregator.init(torch.eye(2).double(), key=jd.random.key(0))
    for row, (weight, phi) in zip(rows, wanted, strict=True):
        jac = torch.tensor(row, dtype=torch.float64)
        got, state = weigh(aggregator, jac, state)
        close(got, [weight, weight])
        close(state.phi[0, 1], phi)


def test_gradvac_edge_cases():
    aggregator = jd.gradvac(1.0)
    state = aggregator.init(A, key=jd.random.key(0))
    parallel = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    _, state = weigh(aggregator, parallel, state)
    close(state.phi, [[0.0, 1.0], [1.0, 0.0]], tol=1e-12)
    got, _ = weigh(aggregator, A, state)  # a target of 1 is out of reach
    assert torch.isfinite(got).all()
    zero_row = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    got, later = weigh(aggregator, zero_row, state)
    close(got, [1.0, 1.0])
    close(later.phi[0, 1], 0.0)
    unmoved = jd.gradvac(0.0)
    state = unmoved.init(A, key=jd.random.key(0))
    close(weigh(unmoved, A, state)[1].phi, torch.zeros(2, 2))


def test_imtl_g():
    close(weights(jd.imtl_g(), A), [0.59233032, 0.40766968])
    close(vector(jd.imtl_g(), A), [0.07669683, 1.0, 1.0])
    close(weights(jd.imtl_g(), B), [0.53437067, 0.26718533, 0.19844400])
    close(vector(jd.imtl_g(), B), [0.33592666, 0.33592666, 0.59533201])
    close(weights(jd.imtl_g(), C), [-0.41404255, -0.49354612, 1.90758867])
    close(vector(jd.imtl_g(), OPPOSITE), [-5.0, 0.0])


def test_imtl_g_can_go_uphill_and_the_safe_variant_cannot():
    close(weights(jd.imtl_g(), E), [4.679344, -1.929721, -1.749622], tol=1e-6)
    uphill = E @ vector(jd.imtl_g(), E)
    close(uphill, [-1.1098206, -3.5095608, -1.5695233])
    close(E @ vector(jd.imtl_g(safe=True), E), -uphill)
    close(vector(jd.imtl_g(safe=True), B), vector(jd.imtl_g(), B))


def test_imtl_g_edge_cases():
    antiparallel = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    close(weights(jd.imtl_g(), antiparallel), [0.0, 0.0])
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    close(weights(jd.imtl_g(), zero_row), [0.59233032, 0.40766968, 0.0])
    sizes = torch.tensor([[1e-6], [1e6]], dtype=torch.float64)
    got = weights(jd.imtl_g(), sizes * A) * sizes.squeeze() * A.norm(dim=1)
    close(got[0] / got[1], 1.0, tol=1e-9)  # equal projections, whatever the norms


@pytest.mark.parametrize(
    ("scale", "want_a", "want_b"),
    [
        ("min", [0.55907192, 0.40826107], [0.22039642, 0.24317125, 0.43343946]),
        ("median", [0.55907192, 0.40826107], [0.43749903, 0.48270831, 0.86040117]),
        ("rmse", [1.51086564, 1.10330640], [0.54051562, 0.59637020, 1.06299728]),
    ],
)
def test_aligned_mtl(scale, want_a, want_b):
    close(weights(jd.aligned_mtl(scale=scale), A), want_a)
    close(vector(jd.aligned_mtl(scale=scale), B), want_b)
    added = weights(jd.aligned_mtl(torch.ones(3), scale), B)
    close(added, 3 * weights(jd.aligned_mtl(scale=scale), B))


def test_aligned_mtl_preference_rank_and_edges():
    close(weights(jd.aligned_mtl([0.7, 0.3]), A), [0.64998714, 0.37767019])
    close(weights(jd.aligned_mtl(), C), [-0.04966311, 0.02069620, 0.10097649])
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    got = weights(jd.aligned_mtl(), zero_row)
    close(got, [*(2 / 3 * weights(jd.aligned_mtl(), A)), 0.0])
    close(weights(jd.aligned_mtl([0.7]), A[:1]), [0.7])
    close(weights(jd.aligned_mtl(), 0 * A), [0.5, 0.5])
    close(vector(jd.aligned_mtl(), torch.stack([A[0], -A[0]])), [0.0, 0.0, 0.0])


def test_aligned_mtl_takes_the_lower_median():
    jac = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
    close(vector(jd.aligned_mtl(scale="median"), jac), torch.full((4,), 2.0 / 4))


def test_config():
    close(vector(jd.config(), A), [0.15880898, 2.07060676, 2.07060676])
    close(vector(jd.config(), B), [1.22874270, 1.22874270, 2.17758797])
    close(vector(jd.config(), C), [0.47004399, -2.30192046])
    close(vector(jd.config([2.0, 1.0]), A), [-0.11884998, 1.93492639, 1.93492639])
    close(vector(jd.config([2.0, 1.0, 1.0]), B), [1.55123246, 0.77561623, 1.63309224])


def test_config_scales_no_rounding():
    close(vector(jd.config(), OPPOSITE), [0.0, 0.0], tol=0.0)
    for seed in range(20):
        row = matrix("gaussian", 1, 50, seed=seed)
        rounded = torch.cat([row, -row / 3])
        close(vector(jd.config(), rounded), torch.zeros(50), tol=0.0)
        got = vector(jd.config(), rounded.float())
        assert torch.equal(got, torch.zeros(50))


def test_config_zero_and_parallel_rows():
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    close(vector(jd.config(), zero_row), vector(jd.config(), A))
    parallel = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    close(vector(jd.config(), parallel), [4.0, 0.0])


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
    got, unit = vector(jd.config(length=length), K[:3]), vector(jd.config(), K[:3])
    unit = unit / unit.norm()
    close(got, common * (K[:3] / norms[:, None] @ unit).sum() * unit)
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    assert torch.isfinite(vector(jd.config(length=length), zero_row)).all()


@pytest.mark.parametrize("length", ["min", "geometric", "harmonic"])
def test_config_lengths_vanish_with_a_row(length):
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    close(vector(jd.config(length=length), zero_row), torch.zeros(3), tol=0.0)


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
        close(got, before - x.detach(), tol=1e-6)
