"""The small solvers: exact, scale-free, batched, honest."""

import itertools

import numpy as np
import pytest
import qpsolvers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.helpers import compiled
from tests.matrices import KINDS, A, jacobians, matrix
from torchjd_func.linalg._search import search
from torchjd_func.linalg._tableau import drive


def kkt_residual(quadratic, linear, z):
    """Return the residual after scaling to a unit diagonal and unit `max|q|`."""
    diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    slope = ((quadratic @ z.unsqueeze(-1)).squeeze(-1) + linear) * scale
    size = (linear * scale).abs().amax(-1, keepdim=True).clamp(min=1e-300)
    y, gradient = z / scale / size, slope / size
    return torch.minimum(y, gradient).abs().amax(-1) / (1 + y.abs().amax(-1))


@given(jacobians(), st.integers(0, 10**6), st.integers(-6, 6))
@settings(deadline=None, max_examples=100)
def test_nnqp_satisfies_its_optimality_conditions(jac, seed, power):
    gramian = jac @ jac.mT * 10.0**power
    coordinates = jd.random.normal(jd.random.key(seed), (len(jac),), dtype=torch.float64)
    linear = gramian @ coordinates  # in the range of the matrix, so that a minimum exists
    solution = jd.linalg.nnqp(gramian, linear)
    assert solution.converged
    assert (solution.value >= 0).all()
    assert kkt_residual(gramian, linear, solution.value) <= 1e-8


@given(jacobians(max_m=5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_nnqp_objective_equals_enumeration(jac, seed):
    gramian = jac @ jac.mT
    linear = gramian @ jd.random.normal(jd.random.key(seed), (len(jac),), dtype=torch.float64)
    got = jd.linalg.nnqp(gramian, linear).value
    want = oracles.enumerate_nnqp(gramian, linear)
    step = jac.mT @ (got - want)
    assert float(step.norm()) <= 1e-8 * float(1 + (jac.mT @ want).norm() + jac.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(8, 4), (16, 8), (16, 40), (32, 20)])
def test_larger_problems_converge(kind, m, n):
    jac = torch.stack([matrix(kind, m, n, seed) for seed in range(3)])
    gramian = jac @ jac.mT
    solution = jd.linalg.nnqp(gramian.unsqueeze(-3), gramian)
    assert solution.converged.all()
    assert (kkt_residual(gramian.unsqueeze(-3), gramian, solution.value) <= 1e-8).all()


def test_the_exact_path_takes_over_and_says_so():
    jac = matrix("gaussian", 30, 10, seed=1)
    gramian = jac @ jac.mT
    solution = jd.linalg.nnqp(gramian, gramian)
    assert solution.fallback.any()
    assert solution.converged.all()
    independent = matrix("gaussian", 10, 30, seed=1)
    assert not jd.linalg.nnqp(independent @ independent.mT, independent[:, :10]).fallback.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(1, 3), (3, 5), (8, 4), (12, 30), (16, 8)])
def test_the_driving_variable_method_alone_agrees(kind, m, n):
    jac = matrix(kind, m, n, seed=2)
    norms = jac.norm(dim=1, keepdim=True)
    jac = jac / torch.where(norms > 0, norms, 1.0)
    gramian = (jac @ jac.mT).numpy()
    want = jd.linalg.nnqp(jac @ jac.mT, jac @ jac.mT)
    for index in range(m):
        definite, vector = gramian + 1e-11 * np.eye(m), gramian[index]
        z, support, pivots = drive(definite, vector, np.zeros(m, dtype=bool), 40)
        assert ((z > 0) <= support).all()
        assert pivots <= 6 * m
        gap = jac.mT @ (torch.from_numpy(z) - want.value[index])
        assert gap.norm() <= 1e-5
        if kind in ("gaussian", "integer") and m <= n:  # from any support, if rows are independent
            again, _, _ = drive(definite, vector, np.arange(m) % 2 == 0, 40)
            np.testing.assert_allclose(again, z, rtol=1e-9, atol=1e-12)


def test_the_opaque_operation_never_waits_for_values():
    meta = torch.empty(2, 5, 5, device="meta", dtype=torch.float64)
    value, *_ = search(meta, meta[..., 0], 1e-11, "auto")
    assert value.shape == (2, 5)


@pytest.mark.parametrize("seed", range(60))
def test_bounded_problems_converge_also_outside_the_range_of_the_matrix(seed):
    m, n = 3 + seed % 4, 1 + seed % 3
    jac = matrix("integer" if seed % 5 == 0 else "gaussian", m, n, seed)
    quadratic = jac @ jac.mT
    noise = jd.random.normal(jd.random.key(seed), (2, m), dtype=torch.float64)
    # `q + Q u >= 0` for some u is what bounds the problem.
    linear = noise[0].clamp(min=0) - quadratic @ noise[1]
    solution = jd.linalg.nnqp(quadratic, linear)
    assert solution.converged
    assert kkt_residual(quadratic, linear, solution.value) <= 1e-8


def test_unbounded_problems_are_not_called_converged():
    quadratic = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert not jd.linalg.nnqp(quadratic, -torch.ones(2, dtype=torch.float64)).converged
    assert not jd.linalg.nnqp(torch.zeros(1, 1), -torch.ones(1)).converged
    for seed in range(20):  # `mu = (2, 1, 0, 0)` has `Q mu = 0` and `q mu < 0`
        jac = matrix("gaussian", 4, 3, seed)
        jac = torch.cat([jac[:1], -2 * jac[:1], jac[2:]])
        linear = jd.random.normal(jd.random.key(seed), (4,), dtype=torch.float64)
        linear = linear * torch.tensor([0.0, 0.0, 1.0, 1.0]) - torch.tensor([1.0, 0.5, 0.0, 0.0])
        solution = jd.linalg.nnqp(jac @ jac.mT, linear)
        assert not solution.converged
        assert solution.value.isnan().all()
    assert jd.linalg.nnqp(torch.zeros(1, 1), torch.ones(1)).converged


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("m", [3, 40])
def test_non_finite_input_gives_non_finite_output(bad, m):
    quadratic = torch.eye(m, dtype=torch.float64)
    linear = -torch.ones(m, dtype=torch.float64)
    for problem in ((quadratic, linear * bad), (quadratic * bad, linear)):
        for solution in (jd.linalg.nnqp(*problem), compiled(jd.linalg.nnqp)[0](*problem)):
            assert not solution.converged
            assert not solution.value.isfinite().all()
    assert not jd.linalg.dual_cone_projection(quadratic * 0, -linear * bad).converged


@pytest.mark.parametrize("solver", ["quadprog"])
def test_other_solvers_agree(solver):
    for kind, (m, n) in itertools.product(("gaussian", "scaled"), ((3, 5), (6, 8))):
        jac = matrix(kind, m, n, seed=7)
        ours, theirs = (jd.upgrad(solver=name)(jac)[0] for name in ("auto", solver))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_dtypes_batches_and_broadcasting():
    gramian = (A @ A.mT).float()
    units = torch.eye(2)
    solution = jd.linalg.dual_cone_projection(gramian, units)
    assert solution.value.dtype == torch.float32
    assert solution.value.shape == (2, 2)
    assert solution.converged.shape == (2,)
    nested = vmap(vmap(lambda u: jd.linalg.dual_cone_projection(gramian, u).value))(
        units.expand(3, 2, 2)
    )
    torch.testing.assert_close(nested, solution.value.expand(3, 2, 2))
    over_matrices = vmap(lambda g: jd.linalg.dual_cone_projection(g, units[0]).value)(
        torch.stack([gramian, 4 * gramian])
    )
    torch.testing.assert_close(over_matrices, solution.value[:1].expand(2, 2))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="a graph of torch 2.11 returns no records")
def test_compiles_with_its_flags():
    gramian = A @ A.mT
    fast, counter = compiled(lambda g: jd.linalg.min_norm_point(g))
    got = fast(gramian)
    assert counter.graphs == 1
    torch.testing.assert_close(got.value, jd.linalg.min_norm_point(gramian).value)
    assert bool(got.converged)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
@settings(deadline=None, max_examples=100)
def test_simplex_projection(numbers):
    y = torch.tensor(numbers, dtype=torch.float64)
    got = jd.linalg.project_simplex(y)
    scale = 1e-9 * (1 + float(y.abs().max()))
    assert (got >= 0).all()
    assert abs(float(got.sum()) - 1) <= scale
    torch.testing.assert_close(got, oracles.project_simplex(y), rtol=0, atol=scale)
    torch.testing.assert_close(jd.linalg.project_simplex(got), got, rtol=0, atol=1e-12)
    torch.testing.assert_close(jd.linalg.project_simplex(y + 3), got, rtol=0, atol=scale)
    torch.testing.assert_close(jd.linalg.project_simplex(y.flip(0)), got.flip(0))


def test_min_norm_point_optimality():
    for kind in KINDS:
        jac = matrix(kind, 6, 9, seed=3)
        gramian = jac @ jac.mT
        solution = jd.linalg.min_norm_point(gramian)
        pushed = gramian @ solution.value
        norms = jac.norm(dim=-1)
        tolerance = norms * (1e-9 * norms.min() + 1e-15 * norms.max()) + 1e-28 * norms.max() ** 2
        assert solution.converged
        assert abs(float(solution.value.sum()) - 1) < 1e-12
        assert (pushed >= solution.value @ pushed - tolerance).all()


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
def test_solutions_are_differentiable(name):
    jac = matrix("gaussian", 4, 7, seed=5)
    weighting = getattr(jd, name)().weighting
    assert torch.autograd.gradcheck(lambda jac: weighting(jac @ jac.mT)[0], (jac.requires_grad_(),))


@pytest.mark.parametrize(("m", "n"), [(8, 4), (16, 8), (40, 25)])
def test_of_many_solutions_the_one_of_least_norm_is_found(m, n):
    jac = matrix("gaussian", m, n, seed=3)
    gramian = jac @ jac.mT
    solution = jd.linalg.nnqp(gramian, gramian)
    assert solution.fallback.any()
    assert kkt_residual(gramian, gramian, solution.value).max() <= 1e-9
    # A small ridge prefers it too; its error is of the order of the ridge.
    scale = gramian.diagonal().rsqrt()
    ridged = (gramian * scale * scale[:, None] + 1e-7 * torch.eye(m)).numpy()
    for index in solution.fallback.nonzero()[:, 0].tolist():
        linear = (gramian[index] * scale).numpy()
        want = qpsolvers.solve_qp(ridged, linear, lb=np.zeros(m), solver="quadprog")
        assert want is not None
        value = solution.value[index] / scale
        torch.testing.assert_close(value, torch.from_numpy(want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("m", "n"), [(32, 16), (64, 20), (128, 64)])
def test_rounding_of_dependent_rows_is_not_taken_for_a_problem(m, n):
    jac = matrix("gaussian", m, n, seed=4).float()
    gramian = jac @ jac.mT
    assert torch.linalg.eigvalsh(gramian.double())[0] < 0
    solution = jd.linalg.nnqp(gramian, gramian)
    assert solution.converged.all()
    assert solution.iterations.max() < 8 * m
    update = jac.double().mT @ (torch.eye(m) + solution.value).double().mT
    slopes = jac.double() @ update / (jac.norm(dim=1)[:, None] * jac.norm(dim=1)).double()
    assert slopes.min() >= -1e-5


def test_derivatives_at_dependent_rows_are_those_of_the_update():
    jac = matrix("gaussian", 12, 6, seed=8)
    rule = jd.upgrad()
    assert jd.linalg.nnqp(jac @ jac.mT, jac @ jac.mT).fallback.any()

    def loss(jac):
        return rule(jac)[0].square().sum()

    step = matrix("gaussian", 12, 6, seed=9)
    slope = (loss(jac + 1e-5 * step) - loss(jac - 1e-5 * step)) / 2e-5
    torch.testing.assert_close(
        (torch.func.grad(loss)(jac) * step).sum(), slope, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows", [[-3.0, 0, 3, 1, -1], [1.0, -1.0], [0.1, 0.2, -0.3], [7.0, -3.5, -3.5]]
)
def test_rows_that_balance_project_to_nothing(rows, dtype):
    jac = torch.tensor(rows, dtype=dtype).unsqueeze(1)
    uniform = torch.full((len(rows),), 1 / len(rows), dtype=dtype)
    solution = jd.linalg.dual_cone_projection(jac @ jac.mT, uniform)
    assert solution.converged
    assert (jac.mT @ solution.value).abs() <= 100 * torch.finfo(dtype).eps * jac.norm()


def repeated(seed):
    """Return a Gramian in float32 of 32 rows, some there twice: eigenvalues of about 0, or less."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(32, 200, generator=generator)
    rows[: 1 + seed % 4] = rows[-1 - seed % 4 :]
    return rows @ rows.mT


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
def test_rows_that_are_there_twice_cost_graphs_and_derivatives_nothing(name):
    weights = getattr(jd, name)().weighting
    fast = torch.compile(lambda gramian: weights(gramian)[0], fullgraph=True, backend="eager")
    for seed in range(40):
        gramian = repeated(seed)
        want = weights(gramian)[0]
        assert want.isfinite().all()
        torch.testing.assert_close(fast(gramian), want, rtol=1e-6, atol=1e-6 * float(want.norm()))
        slope = torch.func.grad(lambda gramian: weights(gramian)[0].sum())(gramian)
        assert slope.isfinite().all()
