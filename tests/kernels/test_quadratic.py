"""The kernel for a GPU: under Triton's interpreter where there is none, else on the device."""

import pytest
import torch

import torchjd_func as jd
from tests import oracles
from tests.matrices import KINDS, balanced, matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels import quadratic
from torchjd_func.linalg import _device
from torchjd_func.linalg._search import on_host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RIDGE, TOL = 1e-11, 1e-10


def solve(gramian, linear, ridge=RIDGE):
    """Solve problems that share a matrix; return the solution, its support, and if it is one."""
    matrices = gramian.unsqueeze(0).to(DEVICE)
    z, free, sound, *_ = quadratic.solve_kernel(matrices, linear.to(DEVICE), ridge, TOL)
    return z.cpu(), free.cpu(), sound.cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(2, 1), (3, 5), (5, 3), (8, 4)])
def test_projections_equal_enumeration(kind, m, n):
    jac = matrix(kind, m, n, seed=m)
    gramian, starts = jac @ jac.mT, torch.eye(m, dtype=torch.float64)[-2:]
    z, free, sound = solve(gramian, starts @ gramian)
    assert sound.all()
    assert (z >= 0).all()
    assert ((z > 0) <= free).all()
    for start, dual in zip(starts, z, strict=True):
        want = oracles.enumerate_nnqp(gramian, gramian @ start)
        length = jac.norm(dim=1).max()
        # Of dependent rows the combination is determined, not the coordinates: to a root of the
        # ridge near balance.
        assert (jac.mT @ (dual - want)).norm() <= 1e-5 * length


@pytest.mark.parametrize("kind", ["scaled", "duplicate", "opposite", "low_rank", "balanced"])
def test_conditions_of_optimality_hold(kind):
    m = 16
    jac = balanced(m, 12, 1e-7, 1) if kind == "balanced" else matrix(kind, m, 12, seed=7)
    gramian = jac @ jac.mT
    z, _, sound = solve(gramian, gramian[:1])
    assert sound.all()
    projected = jac[:1] + z @ jac
    squares = jac.square().sum(1)
    assert ((projected @ jac.mT) >= -1e-5 * squares.max()).all()
    assert (projected.norm(dim=1) <= (1 + 1e-5) * jac[:1].norm(dim=1)).all()


@pytest.mark.parametrize("seed", range(2))
def test_one_variable_at_a_time_where_exchanging_stalls(seed):
    jac = matrix("gaussian", 8, 5, seed)
    gramian = jac @ jac.mT
    matrices, linear = gramian.unsqueeze(0).to(DEVICE), gramian[:2].to(DEVICE)
    at_once = quadratic.solve_kernel(matrices, linear, RIDGE, TOL)
    results = quadratic.Solved(*(torch.full_like(value, -1) for value in at_once))
    quadratic.launch(matrices, linear, RIDGE, TOL, results, drive=True)
    assert results.converged.all()
    torch.testing.assert_close(results[0] @ jac.to(DEVICE), at_once[0] @ jac.to(DEVICE))


@pytest.mark.parametrize("before", [0, 5])
def test_pivots_of_both_launches_add_up(before):
    matrices = torch.eye(3, dtype=torch.float64, device=DEVICE).unsqueeze(0)
    linear = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, 3.0]], dtype=torch.float64, device=DEVICE)
    results = quadratic.solve_kernel(matrices, linear, RIDGE, TOL)
    assert results.pivots.tolist() == [0, 2]
    results = results._replace(pivots=torch.full_like(results.pivots, -1 - before))
    quadratic.launch(matrices, linear, RIDGE, TOL, results, drive=True)
    assert results.pivots.tolist() == [before, before + 2]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_its_own():
    gramian = torch.stack([matrix("gaussian", 4, 4) @ matrix("gaussian", 4, 4).mT] * 2).to(DEVICE)
    gramian[1, 0, 0] = torch.nan
    linear = -torch.ones(4, 4, dtype=torch.float64, device=DEVICE)
    linear[1, 1] = torch.inf
    z, _, sound, *_ = quadratic.solve_kernel(gramian, linear, RIDGE, TOL)
    assert z[0].isfinite().all() and sound.tolist() == [True, False, False, False]
    assert z[1:].isnan().all()


def test_unbounded_is_not_a_number():
    gramian = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    linear = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    z, _, sound = solve(gramian, linear)
    assert z.isnan().all() and not sound.any()


def test_agrees_with_the_solver_of_the_host():
    jac = matrix("gaussian", 12, 20, seed=3)
    gramian = jac @ jac.mT
    z, _, _ = solve(gramian, gramian[:2])
    torch.testing.assert_close(z, jd.linalg.nnqp(gramian, gramian[:2]).value, rtol=1e-9, atol=1e-11)


def test_batches_broadcast_as_on_the_host():
    jacs = torch.stack([matrix("gaussian", 4, 6, seed) for seed in range(2)])
    gramians = jacs @ jacs.mT
    matrices, vectors = gramians.unsqueeze(1), gramians[:, :2]
    value, support, converged, pivots, dependent = _device.on_device(
        _device.in_kernel, matrices.to(DEVICE), vectors.to(DEVICE), RIDGE
    )
    want = on_host(matrices.numpy(), vectors.numpy(), RIDGE, "auto")
    torch.testing.assert_close(value.cpu(), torch.from_numpy(want.value), rtol=1e-9, atol=1e-11)
    assert support.cpu().tolist() == want.support.tolist()
    assert converged.all() and not dependent.any()
    assert pivots.shape == (2, 2)


def test_one_problem_has_no_leading_dimension():
    gramian = matrix("gaussian", 3, 4) @ matrix("gaussian", 3, 4).mT
    linear = -torch.ones(3, dtype=torch.float64)
    value, _, converged, *_ = _device.on_device(
        _device.in_kernel, gramian.to(DEVICE), linear.to(DEVICE), RIDGE
    )
    assert value.shape == (3,) and converged.shape == ()
    torch.testing.assert_close(value.cpu(), jd.linalg.nnqp(gramian, linear).value)


def test_dependent_rows_are_said_to_be():
    rows = matrix("low_rank", 6, 8)
    gramian = (rows @ rows.mT).to(DEVICE)
    parts = _device.on_device(_device.in_kernel, gramian.unsqueeze(0), gramian, RIDGE)
    assert parts[2].all() and parts[4].any()
