"""Every claimed property holds on drawn matrices, and every property not claimed has a witness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.matrices import KINDS, all_matrices, conflict, jacobians, matrix
from tests.properties import (
    flip_gap,
    lowest_conflict,
    scaled_sum_gap,
    scaling_gap,
    span_distance,
    span_gap,
)
from tests.registry import METHODS, Method, exported, losses_for, run

LOWEST_COSINE = -1e-6


def claimants(claim: str) -> list[str]:
    """Return the methods that claim a property."""
    return [name for name, method in METHODS.items() if getattr(method, claim)]


def others(claim: str) -> list[str]:
    """Return the methods that do not."""
    return [name for name in METHODS if name not in claimants(claim)]


def allowed(method: Method, kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[torch.Tensor]:
    """Draw matrices with enough rows, on which the result is determined."""
    if method.unique:
        return jacobians(min_m=method.min_m, kinds=kinds)
    return jacobians(min_m=method.min_m, min_n=6, kinds=("gaussian",))


@pytest.mark.parametrize("name", claimants("non_conflicting"))
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_non_conflicting(name, data):
    jac = data.draw(allowed(METHODS[name]))
    assert conflict(jac, run(METHODS[name], jac, len(jac))) >= LOWEST_COSINE


@pytest.mark.parametrize("name", claimants("non_conflicting"))
@pytest.mark.parametrize(("label", "jac"), all_matrices(), ids=[n for n, _ in all_matrices()])
def test_non_conflicting_on_every_kind(name, label, jac):
    if len(jac) >= METHODS[name].min_m:
        assert conflict(jac, run(METHODS[name], jac, len(jac))) >= LOWEST_COSINE


@pytest.mark.parametrize("name", others("non_conflicting"))
def test_conflicting_has_a_witness(name):
    assert lowest_conflict(METHODS[name]) < -1e-4


@pytest.mark.parametrize("name", claimants("linear_under_scaling"))
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_linear_under_scaling(name, data):
    method = METHODS[name]
    jac = data.draw(allowed(method, ("gaussian", "zero", "duplicate")))
    scales = [
        matrix("gaussian", len(jac), 1, data.draw(st.integers(0, 10**6)))[:, 0].exp()
        for _ in range(2)
    ]
    size = float(run(method, jac, len(jac)).norm())
    if size > 1e-4 * float(jac.norm()):  # otherwise only rounding is left
        assert scaled_sum_gap(method, jac, *scales) < 1e-6


@pytest.mark.parametrize("name", others("linear_under_scaling"))
def test_not_linear_under_scaling_has_a_witness(name):
    assert scaling_gap(METHODS[name]) > 1e-3


@pytest.mark.parametrize("name", claimants("weighted"))
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_weighted(name, data):
    jac = data.draw(allowed(METHODS[name]))
    direction = run(METHODS[name], jac, len(jac))
    if float(direction.norm()) > 1e-7 * float(jac.norm()):
        assert span_gap(jac, direction) < 1e-6


@pytest.mark.parametrize("name", others("weighted"))
def test_not_weighted_has_a_witness(name):
    assert span_distance(METHODS[name]) > 1e-3


@pytest.mark.parametrize("name", [n for n in claimants("equivariant") if not METHODS[n].random])
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_permutation_equivariant(name, data):
    method = METHODS[name]
    jac = data.draw(allowed(method, ("gaussian", "tiny", "scaled")))
    order = torch.tensor(data.draw(st.permutations(range(len(jac)))))
    losses = losses_for(method, len(jac))
    want = run(method, jac, len(jac), losses=losses)
    shuffled = None if losses is None else losses[order]
    got = run(method, jac[order], len(jac), losses=shuffled)
    # Where the direction is zero, config_momentum divides its rounding by 1e-8.
    rounding = 1e-6 if exported(name) == "config_momentum" else 1e-7
    torch.testing.assert_close(got, want, rtol=1e-6, atol=rounding * float(jac.norm()))


@pytest.mark.parametrize("name", [n for n in others("equivariant") if not METHODS[n].random])
def test_not_permutation_equivariant_has_a_witness(name):
    assert flip_gap(METHODS[name]) > 1e-3


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.degree is not None])
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_homogeneous(name, data):
    method = METHODS[name]
    jac = data.draw(allowed(method, ("gaussian", "duplicate", "tiny")))
    power = data.draw(st.integers(-6, 6))
    assert method.degree is not None
    want = run(method, jac, len(jac))
    got = run(method, 10.0**power * jac, len(jac)) * 10.0 ** (-power * method.degree)
    scale = max(float(want.norm()), 1e-3 * float(jac.norm()) ** method.degree)
    assert float((got - want).norm()) <= 1e-5 * scale


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.differentiable])
def test_differentiable(name):
    method = METHODS[name]
    m = max(3, method.min_m)
    jac = matrix("gaussian", m, 5, seed=11)
    assert torch.autograd.gradcheck(
        lambda jac: run(method, jac, m), (jac.clone().requires_grad_(),), rtol=1e-4, atol=1e-6
    )
    derivative = torch.func.jacrev(lambda jac: run(method, jac, m))(jac)
    assert torch.isfinite(derivative).all()
