"""The same numbers as the object-oriented peer, wherever it is exact."""

import pytest
import torch
import torchjd.aggregation as peer

import torchjd_func as jd
from tests.matrices import S, conflict, matrix

GAUSSIAN = [matrix("gaussian", m, n, seed=m * n) for m, n in ((2, 3), (3, 5), (4, 9), (6, 20))]


@pytest.mark.parametrize("jac", GAUSSIAN)
def test_exact_methods_agree(jac):
    weights = torch.arange(1.0, len(jac) + 1, dtype=torch.float64)
    pairs = [
        (jd.mean(), peer.Mean()),
        (jd.sum(), peer.Sum()),
        (jd.constant(weights), peer.Constant(weights)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(jac)[0], theirs(jac), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("jac", GAUSSIAN)
def test_regularised_methods_agree_to_their_regularisation(jac):
    for ours, theirs in [(jd.upgrad(), peer.UPGrad()), (jd.dualproj(), peer.DualProj())]:
        gap = (ours(jac)[0] - theirs(jac)).norm() / ours(jac)[0].norm()
        assert gap < 1e-2


@pytest.mark.parametrize("jac", GAUSSIAN)
def test_mgda_is_at_most_as_long_as_the_iterated_one(jac):
    ours, theirs = jd.mgda()(jac)[0], peer.MGDA()(jac)
    assert ours.norm() <= theirs.norm() * (1 + 1e-12)
    assert (ours - theirs).norm() < 0.1 * jac.norm()


def test_the_peer_conflicts_with_a_tiny_row_and_we_do_not():
    assert conflict(S, peer.UPGrad()(S)) < -0.5
    assert conflict(S, jd.upgrad()(S)[0]) >= -1e-9


def test_the_peer_turns_small_gradients_into_the_mean_and_we_do_not():
    small = 1e-3 * torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(peer.UPGrad()(small), small.mean(0))
    torch.testing.assert_close(jd.upgrad()(small)[0], 1e-3 * jd.upgrad()(1e3 * small)[0])


# What TorchJD 0.18 returns where it hands over to a conic solver that is not installed here.
RECORDED = {
    "cagrad-2x3": (
        jd.cagrad(0.5),
        (2, 3, 6),
        [-0.9300290620811908, 0.42387642174039575, 0.8126007269699607],
    ),
    "cagrad-3x5": (
        jd.cagrad(0.5),
        (3, 5, 15),
        [
            -0.20965638348200938,
            -0.0630015527806774,
            -0.03684975446539707,
            -0.36135873035128246,
            -0.9804393550375399,
        ],
    ),
    "nash_mtl-2x3": (
        jd.nash_mtl(max_norm=1.0),
        (2, 3, 6),
        [-0.7168877607603642, 0.30500507124030246, 0.6269320896155252],
    ),
    "nash_mtl-3x5": (
        jd.nash_mtl(max_norm=1.0),
        (3, 5, 15),
        [
            -0.15414049205027952,
            -0.07111874663824526,
            -0.1437683635080479,
            -0.35170660919334273,
            -0.9092942050244475,
        ],
    ),
}


@pytest.mark.parametrize(("rule", "place", "theirs"), RECORDED.values(), ids=RECORDED.keys())
def test_conic_methods_agree_with_recorded_numbers(rule, place, theirs):
    m, n, seed = place
    got = rule(matrix("gaussian", m, n, seed=seed))[0]
    want = torch.tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
