"""Golden numbers, and slow independent oracles."""

import pytest
import torch
from hypothesis import given, settings

import torchjd_func as jd
from tests import oracles
from tests.helpers import weights_of
from tests.matrices import A, B, C, S, jacobians


def close(got: torch.Tensor, want: list[float] | torch.Tensor, atol: float = 1e-8) -> None:
    """Compare with numbers that are given to eight digits."""
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=atol)


DIRECTIONS = [
    (jd.mean(), A, [1, 1, 1]),
    (jd.sum(), A, [2, 2, 2]),
    (jd.constant([1.0, 2.0]), A, [8, 3, 3]),
    (jd.mean(), C, [-1 / 6, -5 / 6]),
    (jd.upgrad(), A, [0.29239766, 1.90058480, 1.90058480]),
    (jd.upgrad(), B, [0.3, 0.6, 1.3]),
    (jd.upgrad(), C, [0, 0]),
    (jd.upgrad([0.7, 0.3]), A, [-0.03508772, 1.77192982, 1.77192982]),
    (jd.upgrad([0.5, 0.3, 0.2]), B, [0.45, 0.54, 0.93]),
    (jd.dualproj(), A, [0.55555556, 1.11111111, 1.11111111]),
    (jd.dualproj(), B, [0, 1 / 3, 1]),
    (jd.dualproj(), C, [0, 0]),
    (jd.dualproj([0.7, 0.3]), A, [-0.36842105, 1.10526316, 1.10526316]),
    (jd.mgda(), A, [0, 1, 1]),
    (jd.mgda(), B, [0.51428571, 0.25714286, 0.42857143]),
    (jd.mgda(), C, [0, 0]),
    (jd.mgda("l2", apply_to="normalized"), A, [0.01525974, 0.19896184, 0.19896184]),
]

WEIGHTS = [
    (jd.upgrad(), A, [1.11111111, 0.78947368]),
    (jd.upgrad(), B, [0.73333333, 0.51666667, 0.43333333]),
    (jd.upgrad([0.5, 0.3, 0.2]), B, [0.76, 0.425, 0.31]),
    (jd.upgrad(), S, [500.5, 0.50025]),
    (jd.dualproj(), A, [0.61111111, 0.5]),
    (jd.dualproj(), C, [0.9, 0.53333333, 0.33333333]),
    (jd.mgda(), A, [0.6, 0.4]),
    (jd.mgda(), B, [23 / 35, 7 / 35, 5 / 35]),
    (jd.mgda(), C, [27 / 53, 16 / 53, 10 / 53]),
]


@pytest.mark.parametrize(("rule", "jac", "want"), DIRECTIONS)
def test_directions(rule, jac, want):
    close(rule(jac)[0], want)


@pytest.mark.parametrize(("rule", "jac", "want"), WEIGHTS)
def test_weights(rule, jac, want):
    got = weights_of(rule, jac @ jac.mT)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-8)


def test_upgrad_keeps_the_tiny_row_safe():
    close(jd.upgrad()(S)[0], [0.00025, 0.50025])


def test_upgrad_of_two_rows_has_a_closed_form():
    gramian = A @ A.mT
    want = 0.5 * (1 + (-gramian[0, 1] / gramian.diagonal()).clamp(min=0))
    close(weights_of(jd.upgrad(), gramian), want)


def test_mgda_reaches_the_corner_of_the_simplex():
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    close(weights_of(jd.mgda(), rows @ rows.mT), [1.0, 0.0])


@given(jacobians(max_m=5))
@settings(deadline=None, max_examples=80)
def test_upgrad_equals_enumeration(jac):
    got, want = jd.upgrad()(jac)[0], oracles.upgrad(jac)
    assert float((got - want).norm()) <= 1e-8 * float(jac.norm())


@given(jacobians(max_m=5))
@settings(deadline=None, max_examples=80)
def test_dualproj_equals_enumeration(jac):
    got, want = jd.dualproj()(jac)[0], oracles.dualproj(jac)
    assert float((got - want).norm()) <= 1e-8 * float(jac.norm())


@given(jacobians(max_m=5))
@settings(deadline=None, max_examples=80)
def test_mgda_equals_enumeration(jac):
    got, want = jd.mgda()(jac)[0], oracles.min_norm(jac)
    assert float((got - want).norm()) <= 1e-8 * float(jac.norm())


@given(jacobians())
@settings(deadline=None, max_examples=60)
def test_upgrad_satisfies_its_optimality_conditions(jac):
    gramian, units = jac @ jac.mT, torch.eye(len(jac), dtype=jac.dtype)
    projected = jd.linalg.dual_cone_projection(gramian, units).value
    norms = jac.norm(dim=-1)
    moved, pushed = (projected - units) * norms, (projected @ gramian) / norms.clamp(min=1e-300)
    scale = norms[:, None] * (1 + (moved / norms[:, None].clamp(min=1e-300)).amax(-1, True))
    assert (projected >= units).all()
    assert (pushed >= -1e-9 * scale).all()
    assert ((moved * pushed).abs() <= 1e-9 * scale.square()).all()
