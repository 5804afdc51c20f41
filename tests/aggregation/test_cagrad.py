"""Known numbers and edge cases of CAGrad, and a bound from its dual problem."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.helpers import assert_numbers, row_weights, vector_of, weighting
from tests.matrices import A, B, C, all_matrices, matrix

OPPOSITE = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
BALANCED = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


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
        assert_numbers(row_weights(jd.cagrad(c), jac), want_weights)
    if want_vector is not None:
        assert_numbers(vector_of(jd.cagrad(c), jac), want_vector)


def test_cagrad_rescales():
    assert_numbers(vector_of(jd.cagrad(rescale="1+c^2"), A), [0.14680273, 0.96329932, 0.96329932])
    assert_numbers(1.5 * vector_of(jd.cagrad(rescale="1+c"), A), vector_of(jd.cagrad(), A))


MANY = [(f"{kind}-16x8", matrix(kind, 16, 8, seed=2)) for kind in ("gaussian", "integer")]


@pytest.mark.parametrize("c", [0.2, 0.9, 1.5])
@pytest.mark.parametrize(("name", "jac"), all_matrices() + MANY)
def test_cagrad_reaches_its_dual_bound(name, jac, c):
    gramian, m = jac @ jac.T, len(jac)
    mean = jac.mean(0)
    added = row_weights(jd.cagrad(c), jac) - 1 / m
    direction = mean + jac.T @ added
    candidates = [jd.linalg.min_norm_point(gramian).value]
    candidates += [added / added.sum()] if added.sum() > 0 else []
    dual = min(w @ gramian.mean(-1) + c * mean.norm() * (jac.T @ w).norm() for w in candidates)
    norms = jac.norm(dim=1)
    scale = norms[norms > 0].min() * mean.norm()
    assert added.min() >= -1e-12
    assert (direction - mean).norm() <= c * mean.norm() * (1 + 1e-7)
    # Of a direction that cancels, the products with rows that are longer by decades are rounding.
    assert (jac @ direction >= dual - 1e-7 * scale - 1e-12 * norms * norms.mean()).all()


@pytest.mark.parametrize("c", [0.3, 1.2])
@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (4, 6), (5, 9)])
def test_cagrad_equals_enumeration(shape, c):
    for seed in range(8):
        jac = matrix("gaussian", *shape, seed=seed)
        assert_numbers(vector_of(jd.cagrad(c), jac), oracles.cagrad(jac, c), tol=1e-8)
        preference = jd.random.uniform(jd.random.key(seed), shape[:1], dtype=torch.float64)
        preference[seed % len(jac)] = 0  # still counts for the worst improvement
        want = oracles.cagrad(jac, c, preference)
        assert_numbers(vector_of(jd.cagrad(c, preference=preference), jac), want, tol=1e-8)


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_cagrad_keeps_what_it_can_where_rows_balance(c):
    assert_numbers(vector_of(jd.cagrad(c), BALANCED), [0.0, 1 / 3])
    zero_row = torch.cat([A, torch.zeros(1, 3)]).double()
    assert_numbers(vector_of(jd.cagrad(c), zero_row), oracles.dualproj(zero_row))
    tilted = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-0.2, 1.0]], dtype=torch.float64)
    assert_numbers(vector_of(jd.cagrad(c), tilted), [0.0, 1 / 3])
    assert_numbers(vector_of(jd.cagrad(c), OPPOSITE + 0.0), [0.0, 0.0] if c >= 1 else [-0.25, 0.0])


def test_cagrad_single_objective_and_zero_radius():
    assert_numbers(vector_of(jd.cagrad(0.5), A[:1]), 1.5 * A[0])
    assert_numbers(vector_of(jd.cagrad(0.0), C), C.mean(0), tol=1e-12)


def test_cagrad_differentiates_in_the_radius():
    slope = torch.func.grad(lambda c: jd.cagrad(c)(A)[0].sum())(torch.tensor(0.5).double())
    step = 1e-5
    high, low = (vector_of(jd.cagrad(0.5 + s), A).sum() for s in (step, -step))
    assert_numbers(slope, (high - low) / (2 * step), tol=1e-6)


def test_cagrad_mapped_problems_do_not_disturb_each_other():
    jacs = [B, BALANCED, 0 * B, 1e-162 * B, 1e200 * B, torch.nan * B, matrix("duplicate", 3, 3)]
    gramians = torch.stack([jac @ jac.mT for jac in jacs])
    radii = torch.tensor([0.0, 0.3, 1.2], dtype=torch.float64)
    got = vmap(lambda gramian: vmap(lambda c: weighting(jd.cagrad(c))(gramian)[0])(radii))(gramians)
    want = [[weighting(jd.cagrad(float(c)))(gramian)[0] for c in radii] for gramian in gramians]
    want = torch.stack([torch.stack(row) for row in want])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert want.isfinite().all(-1).all(-1).tolist() == [True] * 4 + [False] * 2 + [True]


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7, 1e-8, 1e-9, 1e-10])
@pytest.mark.parametrize(("m", "n"), [(3, 2), (4, 9), (16, 16), (32, 19)])
def test_cagrad_stays_in_a_ball_that_is_small_beside_the_rows(m, n, noise):
    for seed in range(4):
        rows = matrix("gaussian", m, n, seed)
        jac = rows - rows.mean(0) + noise * matrix("gaussian", m, n, seed + 10)
        mean = jac.mean(0)
        for c in (0.4, 1.5):
            for direction in (vector_of(jd.cagrad(c), jac), jac.T @ row_weights(jd.cagrad(c), jac)):
                gone = (direction - mean).norm() / (c * mean.norm())
                assert gone <= 1 + 1e-7 + 1e-13 * m / noise  # what rounds the mean
