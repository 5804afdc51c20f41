"""The solver of problems too large for a kernel, which is the same in torch on every device."""

import pytest
import torch

from tests import oracles
from tests.matrices import KINDS, balanced, matrix
from torchjd_func.linalg import _interior
from torchjd_func.linalg._device import on_device
from torchjd_func.linalg._search import on_host

RIDGE = 1e-11


def solve(matrices, vectors, ridge=RIDGE):
    """Solve problems that broadcast; return value, support, flags, steps, dependence."""
    return on_device(_interior.minimise, matrices, vectors, ridge)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 1), (3, 5), (5, 3), (7, 4)])
def test_projections_equal_enumeration(kind, m, n, device):
    jac = matrix(kind, m, n, seed=m)
    gramian = jac @ jac.mT
    z, support, sound, *_ = (part.cpu() for part in solve(gramian.to(device), gramian.to(device)))
    assert sound.all() and (z >= 0).all() and ((z > 0) <= support).all()
    want = torch.stack([oracles.enumerate_nnqp(gramian, row) for row in gramian])
    assert ((z - want) @ jac).norm(dim=1).max() <= 1e-5 * jac.norm(dim=1).max()


@pytest.mark.parametrize("kind", [*KINDS, "balanced"])
@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 60)])
def test_agrees_with_the_solver_of_the_host(kind, m, n):
    jac = balanced(m, n, 1e-7, 1) if kind == "balanced" else matrix(kind, m, n, seed=7)
    gramian = jac @ jac.mT
    z, _, sound, steps, _ = solve(gramian, gramian)
    want = torch.from_numpy(on_host(gramian.numpy(), gramian.numpy(), RIDGE, "auto").value)
    assert sound.all() and steps.max() < _interior.STEPS
    size = jac.norm(dim=1).max()
    assert ((z - want) @ jac).norm(dim=1).max() <= 1e-9 * size
    assert ((jac + z @ jac) @ jac.mT).min() >= -1e-9 * size**2


@pytest.mark.parametrize("ridge", [RIDGE, 1e-6])
def test_nearly_balanced_rows_stay_short_and_conflict_with_little(ridge):
    dtype = torch.float64 if ridge == RIDGE else torch.float32
    for seed in range(30):
        jac = balanced(6, 9, 10.0 ** -(seed % 10), seed)
        rows = jac.to(dtype)
        gramian = (rows @ rows.mT).double()
        z, _, sound, *_ = solve(gramian, gramian, ridge)
        jac, size = rows.double(), rows.double().norm(dim=1).max()
        projected = jac + z @ jac
        assert sound.all()
        assert projected.norm(dim=1).max() <= (1 + 1e-5) * size
        assert (projected @ jac.mT).min() >= -2 * ridge**0.5 * size**2


def test_unbounded_and_not_finite_are_their_own():
    gramian = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)).repeat(3, 1, 1)
    gramian[2, 0, 1] = torch.nan
    linear = torch.tensor([[-1.0, 0.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    z, _, sound, *_ = solve(gramian, linear)
    assert sound.tolist() == [True, False, False]
    assert z[0].tolist() == [1, 0] and z[1:].isnan().all()


@pytest.mark.parametrize("shared", [True, False])
def test_a_few_at_a_time_are_the_same(shared, monkeypatch):
    jacs = torch.stack([matrix("gaussian", 4, 6, seed) for seed in range(3)])
    gramians = jacs @ jacs.mT
    matrices, vectors = (gramians.unsqueeze(1), gramians) if shared else (gramians, gramians[:, 0])
    want = solve(matrices, vectors)
    monkeypatch.setattr(_interior, "BLOCK", 40)
    got = solve(matrices, vectors)
    assert got[0].shape == vectors.shape
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    host = on_host(matrices.numpy(), vectors.numpy(), RIDGE, "auto").value
    torch.testing.assert_close(got[0], torch.from_numpy(host), rtol=1e-9, atol=1e-11)


def test_dependent_rows_are_said_to_be():
    rows = torch.ones(3, 1, dtype=torch.float64)
    _, _, sound, _, dependent = solve(rows @ rows.mT, -rows.mT)
    assert sound.all() and dependent.all()
