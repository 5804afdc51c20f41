"""Numbers of the methods that resist arbitrary rows: Krum and the trimmed mean."""

import pytest
import torch
import torchjd.aggregation as peer

import torchjd_func as jd
from tests.helpers import close, double, weighting
from tests.matrices import B, C, K, matrix

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
