"""Every claimed property holds on drawn matrices, and every property not claimed has a witness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.matrices import KINDS, A, B, C, E, K, S, all_matrices, conflict, jacobians, matrix
from tests.registry import METHODS, Method, losses_for, run

LOWEST_COSINE = -1e-6
WITNESSES = [A, B, C, E, S, K] + [found for _, found in all_matrices()]


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


def scaled_sum_gap(method: Method, jac: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
    """Return how far `c -> d(diag(c) J)` is from additive, relative to its values."""
    m = len(jac)
    parts = [run(method, scale[:, None] * jac, m) for scale in (c, d, c + d)]
    size = max(float(part.norm()) for part in parts)
    return float((parts[0] + parts[1] - parts[2]).norm()) / max(size, 1e-300)


def span_gap(jac: torch.Tensor, direction: torch.Tensor) -> float:
    """Return the relative distance of a direction from the span of the rows."""
    norms = jac.norm(dim=-1, keepdim=True)
    rows = jac / torch.where(norms > 0, norms, 1.0)
    coordinates = torch.linalg.pinv(rows.mT, rtol=1e-10) @ direction
    return float((rows.mT @ coordinates - direction).norm() / direction.norm().clamp(min=1e-300))


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
    method = METHODS[name]
    found = [conflict(j, run(method, j, len(j))) for j in WITNESSES if len(j) >= method.min_m]
    assert min(found) < -1e-4


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
    method = METHODS[name]
    gaps = []
    for jac in WITNESSES:
        m = len(jac)
        if m >= method.min_m:
            ramp = torch.linspace(1.0, 3.0, m, dtype=torch.float64)
            gaps.append(scaled_sum_gap(method, jac, ramp, ramp.flip(0).square()))
    assert max(gaps) > 1e-3


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
    method = METHODS[name]
    gaps = [span_gap(j, run(method, j, len(j))) for j in WITNESSES if len(j) >= method.min_m]
    assert max(gaps) > 1e-3


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
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * float(jac.norm()))


@pytest.mark.parametrize("name", [n for n in others("equivariant") if not METHODS[n].random])
def test_not_permutation_equivariant_has_a_witness(name):
    method = METHODS[name]
    gaps = []
    for jac in WITNESSES:
        if len(jac) >= method.min_m:
            gap = run(method, jac.flip(0), len(jac)) - run(method, jac, len(jac))
            gaps.append(float(gap.norm() / jac.norm()))
    assert max(gaps) > 1e-3


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
