"""Numbers of the methods that resist arbitrary rows: Krum, medians and the trimmed mean."""

import pytest
import torch
import torchjd.aggregation as peer

import torchjd_func as jd
from tests.helpers import close, double, weighting
from tests.matrices import KINDS, SIZES, B, C, K, matrix

# Krum


@pytest.mark.parametrize("squared", [True, False])
def test_krum_values(squared):
    close(jd.krum(1, squared=squared)(K)[0], [1.0, 0.0, 1.0])
    close(jd.krum(1, 4, squared=squared)(K)[0], [1.25, 0.75, 1.5])
    close(weighting(jd.krum(1, 4, squared=squared))(K @ K.T)[0], [0.25, 0.25, 0.0, 0.25, 0.25])


def test_krum_squared_and_plain_distances_differ():
    rows = double([-1, -3], [1, -2], [-3, 0], [1, 0], [-2, 0])
    close(jd.krum(1)(rows)[0], rows[1])
    close(jd.krum(1, squared=False)(rows)[0], rows[4])
    close(peer.Krum(1)(rows), rows[4])


def test_krum_equal_scores_go_to_the_smaller_index():
    close(jd.krum(1, 2)(K)[0], (K[0] + K[1]) / 2)  # rows 0 and 4 tie behind row 1
    close(weighting(jd.krum(0, 2))(torch.eye(5, dtype=torch.float64))[0], [0.5, 0.5, 0, 0, 0])
    twice = torch.cat([K, K[1:2]])
    assert weighting(jd.krum(1))(twice @ twice.T)[0].argmax() == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "f", "q"), [(4, 1, 1), (7, 2, 3), (12, 4, 5), (9, 0, 9)])
def test_krum_equals_the_peer_and_a_double_loop(m, f, q, seed):
    jac = matrix("gaussian", m, 6, seed)
    close(jd.krum(f, q, squared=False)(jac)[0], peer.Krum(f, q)(jac), atol=1e-8)
    scores = []
    for i in range(m):
        distances = sorted(float((jac[i] - jac[j]).square().sum()) for j in range(m) if j != i)
        scores.append(sum(distances[: m - f - 2]))
    best = sorted(range(m), key=lambda i: scores[i])[:q]
    close(jd.krum(f, q)(jac)[0], jac[best].mean(dim=0), atol=1e-8)


@pytest.mark.parametrize("squared", [True, False])
def test_krum_survives_rounding_between_almost_equal_rows(squared):
    for seed in range(30):
        noise = 1e-12 * matrix("gaussian", 4, 3, seed + 100)
        close_rows = matrix("gaussian", 1, 3, seed) + noise  # squared distances below zero
        jac = torch.cat([matrix("gaussian", 1, 3, seed + 50), close_rows])
        got, _ = jd.krum(1, 4, squared=squared)(jac)
        close(got, close_rows[0], atol=1e-10)


def test_krum_says_how_many_objectives_it_needs():
    with pytest.raises(ValueError, match=r"at least 4 objectives \(n_byzantine \+ 3\), got 3"):
        jd.krum(1)(B)
    with pytest.raises(ValueError, match=r"at least 5 objectives \(n_selected\), got 3"):
        jd.krum(0, 5)(B)
    for options in ((-1, 1), (1, 0), (1, True)):
        with pytest.raises(ValueError, match="must be an int of at least"):
            jd.krum(*options)


# Geometric median


def excess_pull(jac: torch.Tensor, point: torch.Tensor, shares: torch.Tensor) -> float:
    """Return by how much a point misses being the median: the pull beyond that of rows on it."""
    away = point - jac
    on = away.norm(dim=1) <= 1e-12 * jac.norm(dim=1)
    pull = (shares[~on, None] * away[~on] / away[~on].norm(dim=1, keepdim=True)).sum(dim=0)
    return float(pull.norm() - shares[on].sum())


def test_geometric_median_values():
    root = 3**0.5
    close(jd.geometric_median()(double([1, 0], [-0.5, root / 2], [-0.5, -root / 2]))[0], [0, 0])
    close(jd.geometric_median()(double([0, 0], [2, 0], [0, 2], [2, 2]))[0], [1, 1])  # diagonals
    close(jd.geometric_median()(double([0, 0], [0, 1], [1, 0], [9, 9]))[0], [0.5, 0.5])
    close(
        jd.geometric_median()(double([0, 0], [1, 0.1], [-1, 0.1]))[0], [0, 0]
    )  # above 120 degrees
    corner = (3 - root) / 6  # Fermat's point of a right angle
    close(jd.geometric_median()(double([0, 0], [1, 0], [0, 1]))[0], [corner, corner])


def test_geometric_median_on_a_line_is_the_median():
    close(jd.geometric_median()(double([1, 1], [5, 5], [2, 2]))[0], [2, 2], atol=0)
    close(jd.geometric_median()(double([1, 1], [5, 5], [2, 2], [4, 4]))[0], [3, 3], atol=1e-15)
    close(jd.geometric_median([0.2, 0.6, 0.2])(double([1, 1], [5, 5], [2, 2]))[0], [5, 5], atol=0)
    close(jd.geometric_median()(double([3, 1], [0, 2]))[0], [1.5, 1.5], atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_geometric_median_is_the_minimum_by_its_subgradient(kind, m, n):
    for seed in range(4):
        jac = matrix(kind, m, n, seed)
        shares = torch.linspace(1, 2, m, dtype=torch.float64)
        for preference, rule in (
            (torch.ones_like(shares), jd.geometric_median()),
            (shares, jd.geometric_median(shares)),
        ):
            assert excess_pull(jac, rule(jac)[0], preference) < 1e-7


def test_geometric_median_is_found_by_descent_too():
    jac = matrix("gaussian", 7, 4)
    point = jac.mean(dim=0).requires_grad_()
    options = {"max_iter": 200, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([point], tolerance_grad=1e-12, tolerance_change=0, **options)

    def closure():
        optimizer.zero_grad()
        total = (jac - point).norm(dim=1).sum()
        total.backward()
        return total

    optimizer.step(closure)
    close(jd.geometric_median()(jac)[0], point.detach(), atol=1e-7)


@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
def test_geometric_median_stays_bounded_by_the_sound_rows(size):
    for seed in range(10):
        sound, bad = matrix("gaussian", 5, 4, seed), size * matrix("gaussian", 4, 4, seed + 50)
        shares = torch.full((9,), 1 / 9, dtype=torch.float64)
        for rows in (torch.cat([bad, sound]), torch.cat([bad[:1].expand(4, 4), sound])):
            got = jd.geometric_median()(rows)[0]
            alpha = 4 / 9
            bound = (2 - 2 * alpha) / (1 - 2 * alpha) * sound.norm(dim=1).max()
            assert got.norm() <= bound
            assert excess_pull(rows, got, shares) < 1e-9


def test_geometric_median_close_to_a_row_and_on_it():
    jac = matrix("gaussian", 5, 3)
    units = (jac[1:] - jac[0]) / (jac[1:] - jac[0]).norm(dim=1, keepdim=True)
    pull = float(units.sum(dim=0).norm())  # of the others at row 0
    for share in (pull * (1 + 1e-3), pull):
        close(jd.geometric_median([share, 1, 1, 1, 1])(jac)[0], jac[0], atol=0)
    for gap in (1e-2, 1e-4, 1e-6):
        shares = double(pull * (1 - gap), 1, 1, 1, 1)
        got = jd.geometric_median(shares)(jac)[0]
        assert 0 < float((got - jac[0]).norm()) < 30 * gap
        assert excess_pull(jac, got, shares) < 1e-8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_geometric_median_gives_no_weight_to_what_is_not_finite(bad):
    sound = matrix("gaussian", 4, 3)
    rows = torch.cat([sound[:1], torch.full((2, 3), bad, dtype=torch.float64), sound[1:]])
    weights = weighting(jd.geometric_median())(rows @ rows.mT)[0]
    assert not weights[1:3].any()
    kept = weights[[0, 3, 4, 5]]
    close(sound.mT @ kept, jd.geometric_median()(sound)[0], atol=1e-12)


# Trimmed mean


def test_trimmed_mean_values():
    close(jd.trimmed_mean(1)(B)[0], [0.0, 0.0, 0.0])
    close(jd.trimmed_mean(1)(C)[0], [0.5, -1.5])
    wild = double([1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2])
    close(jd.trimmed_mean(1)(wild)[0], [1.5, 2.5], atol=0)


@pytest.mark.parametrize(("m", "t"), [(3, 0), (3, 1), (6, 2), (9, 4)])
def test_trimmed_mean_equals_the_peer(m, t):
    jac = matrix("gaussian", m, 7, seed=t)
    got = jd.trimmed_mean(t)(jac)[0]
    close(got, peer.TrimmedMean(t)(jac), atol=1e-12)
    if t == 0:
        close(got, jac.mean(dim=0), atol=1e-12)
    if m == 2 * t + 1:
        close(got, jac.median(dim=0).values, atol=0)


def test_trimmed_mean_ignores_arbitrary_rows():
    jac = matrix("gaussian", 5, 4)
    for attack in (torch.inf, -torch.inf, 1e300):
        got = jd.trimmed_mean(1)(torch.cat([jac[:4], torch.full_like(jac[4:], attack)]))[0]
        assert (got >= jac[:4].min(dim=0).values).all()
        assert (got <= jac[:4].max(dim=0).values).all()


def test_trimmed_mean_says_how_many_objectives_it_needs():
    with pytest.raises(ValueError, match=r"at least 5 objectives \(2 trim_number \+ 1\), got 3"):
        jd.trimmed_mean(2)(B)
    with pytest.raises(ValueError, match="`trim_number` must be an int of at least 0, got -1"):
        jd.trimmed_mean(-1)


def test_a_median_that_is_not_found_is_not_a_number():
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        lengths = 10 ** (120 * torch.rand(5, 1, generator=generator).double() - 60)
        jac = lengths * torch.randn(5, 4, generator=generator).double()
        weights, _ = weighting(jd.geometric_median())(jac @ jac.mT)
        convex = abs(weights.sum() - 1) < 1e-6 and weights.min() > -1e-6
        assert weights.isnan().all() or convex
