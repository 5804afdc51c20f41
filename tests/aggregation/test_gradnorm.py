"""Numbers of GradNorm."""

import pytest
import torch

import torchjd_func as jd
from tests.helpers import close, double, weighting
from tests.matrices import A, B, matrix


def gradnorm_state(weights, initial) -> tuple:
    """Return the weighting and a state after the first call."""
    rule = weighting(jd.gradnorm())
    state = rule.init(A @ A.T)
    return rule, state._replace(
        weights=double(*weights), initial_losses=double(*initial), visits=state.visits + 1
    )


def test_gradnorm_values():
    rule, state = gradnorm_state((1.0, 1.0), (1.0, 4.0))
    weights, later = rule(A @ A.T, state, losses=double(0.5, 3.0))
    close(weights, [1.0, 1.0])
    close(later.weights, [0.87296351, 1.12703649])
    close(rule(A @ A.T, later, losses=double(0.5, 3.0))[0], [0.87296351, 1.12703649])
    close(jd.gradnorm()(A, state, losses=double(0.5, 3.0))[0], [2.0, 2.0, 2.0])


def test_gradnorm_softmax_descends_on_logits():
    _, state = gradnorm_state((1.0, 1.0), (1.0, 4.0))
    rule = jd.gradnorm(lr=0.01, parametrization="softmax")
    grads, later = rule(A, state, losses=double(0.5, 3.0))
    close(grads, [2.0, 2.0, 2.0])
    close(later.weights.log().diff(), [2 * 0.01 * 5.20352735])
    close(later.weights.sum(), 2.0)


@pytest.mark.parametrize("parametrization", ["renormalized", "softmax"])
def test_gradnorm_step_is_the_derivative_of_its_loss(parametrization):
    jac, losses = matrix("gaussian", 4, 6), double(0.5, 3.0, 1.0, 0.9)
    rule = jd.gradnorm(0.8, 1e-3, parametrization=parametrization)
    state = rule.init(jac)._replace(
        weights=double(0.4, 1.2, 1.6, 0.8),
        initial_losses=double(1.0, 2.0, 3.0, 0.7),
        visits=torch.ones(4, dtype=torch.int64),
    )
    rates = losses / state.initial_losses
    rates = (rates / rates.mean()) ** 0.8

    def imbalance(variable):
        soft = parametrization == "softmax"
        weights = 4 * torch.softmax(variable, dim=0) if soft else variable
        norms = weights * jac.norm(dim=1)
        return (norms - norms.mean().detach() * rates).abs().sum()

    start = state.weights.log() if parametrization == "softmax" else state.weights
    start = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(imbalance(start), start)
    moved = start.detach() - 1e-3 * slope
    want = moved.softmax(dim=0) if parametrization == "softmax" else moved / moved.sum()
    close(rule(jac, state, losses=losses)[1].weights, 4 * want, atol=1e-12)


def test_gradnorm_without_restoring_force_equalises_the_norms():
    rule = jd.gradnorm(0.0, 1e-4)
    state = rule.init(B)
    for _ in range(6000):
        _, state = rule(B, state, losses=double(1.0, 1.0, 1.0))
    norms = state.weights * B.norm(dim=1)
    assert (norms.max() - norms.min()) / norms.mean() < 1e-2


def test_gradnorm_takes_a_negative_loss_for_zero():
    rule = jd.gradnorm()
    _, state = rule(B, losses=double(1.0, 1.0, 1.0))
    _, got = rule(B, state, losses=double(1.0, -1.0, 1.0))
    _, want = rule(B, state, losses=double(1.0, 0.0, 1.0))
    close(got.weights, want.weights, atol=0)


def test_gradnorm_stays_finite_and_on_the_simplex():
    for losses in ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]):
        for lr in (0.5, 10.0):
            rule, state = jd.gradnorm(lr=lr), None
            for shift in ([0.0, 0.0, 0.0], [4.0, -2.0, 0.0], [-3.0, -3.0, -3.0], [0.5, 0.5, 1.0]):
                grads, state = rule(B, state, losses=double(*losses) + double(*shift))
                assert torch.isfinite(grads).all()
                assert (state.weights >= 0).all()
                close(state.weights.sum(), 3.0, atol=1e-12)
