"""PCGrad and GradVac on a GPU: under Triton's interpreter where there is none, else there."""

import pytest
import torch

import torchjd_func as jd
from tests.matrices import KINDS, matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels.surgery import project_kernel, raise_kernel
from torchjd_func.aggregation._gradvac import _correct
from torchjd_func.aggregation._orders import shuffled_others
from torchjd_func.aggregation._pcgrad import _project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOL = 1e-14


def problem(kind, m):
    """Return a Gramian and orders."""
    jac = matrix(kind, m, 4, seed=m)
    return jac @ jac.mT, torch.as_tensor(shuffled_others(jd.random.key(m), m))


@pytest.mark.parametrize("kind", KINDS)
def test_projects_as_on_the_host(kind):
    gramian, orders = problem(kind, 5)
    got = project_kernel(gramian.to(DEVICE), orders.to(DEVICE)).sum(0).cpu()
    torch.testing.assert_close(got, _project(torch, gramian, orders), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_raises_cosines_as_on_the_host(kind):
    gramian, orders = problem(kind, 5)
    targets = jd.random.uniform(jd.random.key(1), (5, 5), dtype=torch.float64) - 0.5
    got = raise_kernel(gramian.to(DEVICE), targets.to(DEVICE), orders.to(DEVICE), TOL)
    want = _correct(torch, gramian, targets, orders, tol=TOL)
    torch.testing.assert_close(got[0].sum(0).cpu(), want[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-9, atol=1e-12)
