"""The solver of problems too large for a kernel, which is the same in torch on every device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracles
from tests.matrices import KINDS, balanced, matrix
from torchjd_func import _host
from torchjd_func.linalg import _conjugate, _interior
from torchjd_func.linalg._device import on_device
from torchjd_func.linalg._search import on_host

RIDGE = 1e-11


def solve(matrices, vectors, ridge=RIDGE):
    """Solve problems that broadcast; return value, support, flags, steps, dependence."""
    return on_device(_interior.minimise, matrices, vectors, ridge)


@pytest.fixture(params=["eager", "graph"])
def mode(request, monkeypatch):
    """Wait for numbers, or do not, as in a CUDA graph."""
    if request.param == "graph":
        monkeypatch.setattr(_host, "may_wait", lambda value: False)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 1), (3, 5), (5, 3), (7, 4)])
def test_projections_equal_enumeration(kind, m, n, device, mode):
    jac = matrix(kind, m, n, seed=m)
    gramian = jac @ jac.mT
    z, support, sound, *_ = (part.cpu() for part in solve(gramian.to(device), gramian.to(device)))
    assert sound.all() and (z >= 0).all() and ((z > 0) <= support).all()
    want = torch.stack([oracles.enumerate_nnqp(gramian, row) for row in gramian])
    assert ((z - want) @ jac).norm(dim=1).max() <= 1e-5 * jac.norm(dim=1).max()


@pytest.mark.parametrize("kind", [*KINDS, "balanced"])
@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 60)])
def test_agrees_with_the_solver_of_the_host(kind, m, n, mode):
    jac = balanced(m, n, 1e-7, 1) if kind == "balanced" else matrix(kind, m, n, seed=7)
    gramian = jac @ jac.mT
    z, _, sound, steps, _ = solve(gramian, gramian)
    want = torch.from_numpy(on_host(gramian.numpy(), gramian.numpy(), RIDGE, "auto").value)
    assert sound.all()
    assert steps.max() < _interior.STEPS + (_conjugate.ROUNDS if mode == "eager" else 0)
    size = jac.norm(dim=1).max()
    assert ((z - want) @ jac).norm(dim=1).max() <= 1e-9 * size
    assert ((jac + z @ jac) @ jac.mT).min() >= -1e-9 * size**2


def copies(m, n):
    """Return rows of which each is there twice, and once against itself."""
    rows = matrix("gaussian", m // 3, n, seed=0)
    return torch.cat([rows, 2 * rows, -rows])


DEPENDENT = {
    **{str(n): lambda n=n: matrix("gaussian", 96, n, seed=0) for n in (86, 48, 24, 12)},
    "copies": lambda: copies(96, 40),
    "balanced": lambda: balanced(96, 40, 0.0, 0),
    "nearly balanced": lambda: balanced(96, 120, 1e-7, 0),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_dependent_rows_are_solved(kind, mode):
    jac = DEPENDENT[kind]()
    gramian = jac @ jac.mT
    z, _, sound, *_ = solve(gramian, gramian)
    size, lengths = jac.norm(dim=1).max(), jac.norm(dim=1)
    projected = jac + z @ jac
    assert sound.all()
    assert (projected.norm(dim=1) <= (1 + 1e-9) * lengths).all()
    assert (projected @ jac.mT).min() >= -1e-9 * size**2
    want = torch.from_numpy(on_host(gramian.numpy(), gramian.numpy(), RIDGE, "auto").value)
    assert ((z - want) @ jac).norm(dim=1).max() <= 1e-8 * size


def test_the_end_of_the_path_is_kept_where_rounding_spoils_systems(mode, monkeypatch):
    jac = matrix("gaussian", 24, 60, seed=0)
    gramian = jac @ jac.mT
    want = solve(gramian, gramian)[0]
    monkeypatch.setattr(_interior, "factor_on", lambda matrix, support: matrix * torch.nan)
    z, _, sound, _, dependent = solve(gramian, gramian)
    assert sound.all() and dependent.all()
    torch.testing.assert_close(z, want, rtol=1e-6, atol=1e-9)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("m", [40, 160])
def test_independent_rows_take_as_many_products_at_every_size(m, monkeypatch):
    monkeypatch.setattr(_interior, "_by_interior", None)
    jac = matrix("gaussian", m, 4 * m, seed=0)
    gramian = jac @ jac.mT
    with Products() as products:
        _, _, sound, rounds, _ = solve(gramian, gramian)
    assert sound.all() and rounds.max() <= 16
    assert 0 < products.count <= 150


@pytest.mark.parametrize("ridge", [RIDGE, 1e-6])
def test_nearly_balanced_rows_stay_short_and_conflict_with_little(ridge, mode):
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


def test_unbounded_and_not_finite_are_their_own(mode):
    gramian = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)).repeat(3, 1, 1)
    gramian[2, 0, 1] = torch.nan
    linear = torch.tensor([[-1.0, 0.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    z, _, sound, *_ = solve(gramian, linear)
    assert sound.tolist() == [True, False, False]
    assert z[0].tolist() == [1, 0] and z[1:].isnan().all()


@pytest.mark.parametrize("shared", [True, False])
def test_a_few_at_a_time_are_the_same(shared, mode, monkeypatch):
    jacs = torch.stack([matrix("gaussian", 4, 6, seed) for seed in range(3)])
    gramians = jacs @ jacs.mT
    matrices, vectors = (gramians.unsqueeze(1), gramians) if shared else (gramians, gramians[:, 0])
    want = solve(matrices, vectors)
    monkeypatch.setattr(_interior, "BLOCK", 40)
    got = solve(matrices, vectors)
    assert got[0].shape == vectors.shape
    for name, ours, theirs in zip(
        ("z", "support", "sound", "steps", "dependent"), got, want, strict=True
    ):
        if name != "steps":  # a matrix that is left alone is tried by products
            torch.testing.assert_close(ours, theirs)
    host = on_host(matrices.numpy(), vectors.numpy(), RIDGE, "auto").value
    torch.testing.assert_close(got[0], torch.from_numpy(host), rtol=1e-9, atol=1e-11)


def test_dependent_rows_are_said_to_be(mode):
    rows = torch.ones(3, 1, dtype=torch.float64)
    _, _, sound, _, dependent = solve(rows @ rows.mT, -rows.mT)
    assert sound.all() and dependent.all()
