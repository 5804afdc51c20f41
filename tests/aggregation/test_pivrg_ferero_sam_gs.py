"""Numbers of the authors' code, and limits, of PIVRG, FERERO, SAM-GS and logarithms of losses."""

import pytest
import torch

import torchjd_func as jd
from tests.matrices import A, B
from tests.values import close, rows, sequence, weights_of


@pytest.mark.parametrize(
    ("jac", "scores", "want"),
    [
        (A, [0.0, 20.0], [0.45531532, 0.31752908]),
        (B, [-3.0, 4.0, 0.0], [1.13380427, 0.56690213, 0.35352205]),
        (B, [0.0, 40.0, 10.0], [1.14151586, 0.57075793, 0.34946379]),
    ],
)
def test_pivrg_values(jac, scores, want):
    close(weights_of(jd.pivrg(scores), jac), want, 8)


def test_pivrg_of_equal_scores_is_fairgrad_of_two():
    close(weights_of(jd.pivrg([7.0, 7.0, 7.0]), B), weights_of(jd.fairgrad(2.0), B), 12)


def test_pivrg_bounds_the_ratio_of_the_powers():
    orthogonal = torch.eye(2, dtype=torch.float64)
    weights = weights_of(jd.pivrg([0.0, 1e6], alpha=1.0, bound=3.0), orthogonal)
    close((weights[1] / weights[0]).square(), 3.0, 9)


def test_ferero_values():
    weights = weights_of(jd.ferero([0.6, 0.8], 0.01), A, losses=[1.0, 2.0])
    close(weights, [0.59225603, 0.40774397], 8)


def test_ferero_descends_to_the_ray():
    target = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)

    def objective(x):
        return (x - target).square().sum(1)

    preference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rule, x = jd.ferero(preference, 0.1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    step, state = jd.grad(objective, rule), rule.init(jd.jac(objective)(x))
    for _ in range(3000):
        grads, state = step(state, x)
        x = x - 0.01 * grads
    losses = objective(x)
    assert abs(float(x[1])) < 1e-3  # on the front
    close(losses / losses.sum(), preference / 3, 3)


def test_sam_gs_values():
    for jac, gamma, want in (
        (A, 0.1, [[303.22414861, 30.32241486], [125.90270932, 27.46968203]]),
        (B, 0.1, [[0.0, 11.7986084, 35.39582519], [14.06436917, 25.78467682, 43.95115367]]),
        (B, 0.9, [[1.47069692, 1.47069692, 1.90453403], [14.06436917, 25.78467682, 43.95115367]]),
    ):
        rule = jd.sam_gs(gamma)
        first, state = rule(jac)
        close(first[: len(want[0])], want[0], 6)
        close(rule(0.5 * jac + 1, state)[0][: len(want[1])], want[1], 6)


def test_sam_gs_of_a_zero_gradient_adds_nothing():
    with_zero = torch.cat([A, 0 * A[:1]])
    got = jd.sam_gs(1.0)(with_zero)[0]
    norms = A.norm(dim=1)
    close(got, norms.sum() / 3 * (A / norms[:, None]).sum(0), 12)


def test_log_losses_are_those_of_the_logarithms():
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    scaled = B / losses[:, None]
    for rule in (jd.upgrad(), jd.cagrad(), jd.trimmed_mean(1), jd.nash_mtl()):
        close(jd.log_losses(rule)(B, losses=losses)[0], rule(scaled)[0], 9)
    factors = torch.tensor([3.0, 0.1, 7.0], dtype=torch.float64)
    got = jd.log_losses(jd.mgda())(factors[:, None] * B, losses=factors * losses)[0]
    close(got, jd.mgda()(scaled)[0], 9)


def test_log_losses_need_positive_losses():
    rule = jd.log_losses(jd.sum())
    close(rule(rows([2.0], [3.0]), losses=torch.tensor([1.0, 3.0]))[0], [3.0], 12)
    assert rule(rows([2.0], [3.0]), losses=torch.tensor([1.0, 0.0]))[0].isnan().all()
    with pytest.raises(ValueError, match="losses"):
        rule(rows([2.0]))


def test_log_losses_keep_the_state_of_the_rule():
    weighting = jd.log_losses(jd.nash_mtl(update_every=2)).weighting
    assert weighting is not None
    state, losses = weighting.init(A @ A.mT), torch.ones(2, dtype=torch.float64)
    found = []
    for jac in (A, 2 * A):
        weights, state = weighting(jac @ jac.mT, state, losses=losses)
        found.append(weights)
    want = jd.nash_mtl(update_every=2).weighting
    assert want is not None
    close(torch.stack(found), torch.stack(sequence(want, [A @ A.mT, 4 * A @ A.mT])), 12)
