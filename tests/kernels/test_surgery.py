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


def problems(m):
    """Return Gramians of all kinds, and orders."""
    jacs = torch.stack([matrix(kind, m, 4, seed=m) for kind in KINDS])
    orders = [torch.as_tensor(shuffled_others(jd.random.key(i), m)) for i in range(len(KINDS))]
    return jacs @ jacs.mT, torch.stack(orders)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_projects_as_on_the_host(m):
    gramians, orders = problems(m)
    got = project_kernel(gramians.to(DEVICE), orders.to(DEVICE)).sum(1).cpu()
    for result, *given in zip(got, gramians, orders, strict=True):
        torch.testing.assert_close(result, _project(torch, *given), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_raises_cosines_as_on_the_host(m):
    gramians, orders = problems(m)
    targets = jd.random.uniform(jd.random.key(1), gramians.shape, dtype=torch.float64) - 0.5
    got = raise_kernel(gramians.to(DEVICE), targets.to(DEVICE), orders.to(DEVICE), TOL)
    for coordinates, seen, *given in zip(*got, gramians, targets, orders, strict=True):
        want = _correct(torch, *given, tol=TOL)
        torch.testing.assert_close(coordinates.sum(0).cpu(), want[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen.cpu(), want[1], rtol=1e-9, atol=1e-12)
