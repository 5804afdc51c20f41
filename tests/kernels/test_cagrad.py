"""CAGrad's search on a GPU: under Triton's interpreter where there is none, else on the device."""

import pytest
import torch

from tests.matrices import matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels import cagrad
from torchjd_func.aggregation import _cagrad_search as host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RIDGE = 1e-11
# Of these the mean gradient is short, or rows nearly balance.
HARD = [
    [[2.0, 0.0, 0.002, 0.003], [-1.0, -0.001, -0.002, 0.0], [-1.0, 0.001, -0.002, -0.001]],
    [[2.998, 0.001, 0.001, 0.0], [-2.999, -0.001, -0.001, 0.0], [-1.002, 0.0, -3.002, 0.0]],
]


def search(gramians, shares, c):
    """Search on the device, and on the host."""
    radii = torch.full((len(gramians),), c, dtype=torch.float64)
    pushed = (gramians @ shares.unsqueeze(-1)).squeeze(-1)
    got = cagrad.search_kernel(
        *(x.to(DEVICE) for x in (gramians, shares, pushed, radii)),
        ridge=RIDGE,
        tol=1e-8,
        steps=host.STEPS,
        shortest=host.SHORTEST * RIDGE**0.5,
        length_tol=host.LENGTH_TOL,
    )
    arrays = [x.numpy() for x in (gramians, shares, pushed, radii)]
    want = host._search(*arrays, ridge=RIDGE)
    return got.cpu(), torch.from_numpy(want)


def uniform(n, m):
    """Return the weights of mean gradients."""
    return torch.full((n, m), 1 / m, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # interpreted
@pytest.mark.parametrize("m", [1, 2, 4])
def test_every_size_is_padded_without_a_trace(m):
    jac = matrix("gaussian", m, 12, seed=m)
    jac[0] = -2 * jac[1:].mean(0) if m > 2 else jac[0]
    got, want = search((jac @ jac.mT).unsqueeze(0), uniform(1, m), 0.5)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, equal_nan=True)
    assert got[0, 0].isfinite().all()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_not_finite_stays_its_own():
    jacs = torch.stack([matrix("gaussian", 3, 4)] * 2)
    jacs[1, 0, 0] = torch.nan
    got, want = search(jacs @ jacs.mT, uniform(2, 3), 0.5)
    torch.testing.assert_close(got[0], want[0], rtol=1e-7, atol=1e-9)
    assert got[1].isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # interpreted
@pytest.mark.parametrize("c", [0.5, 1.5])
def test_equals_the_search_of_the_host(c):
    jacs = torch.stack([*torch.tensor(HARD, dtype=torch.float64), matrix("gaussian", 3, 4)])
    gramians = jacs @ jacs.mT
    got, want = search(gramians, uniform(3, 3), c)
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-6, atol=1e-6)
    # Of the second the first two rows are opposite up to rounding: no length is determined.
    regular = [0, 2]
    torch.testing.assert_close(got[regular, 1], want[regular, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # interpreted
def test_absent_rows_count_as_if_they_were_not_there():
    jac = matrix("gaussian", 4, 6, seed=3)
    jac[1] = 0
    shares = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64) / 3
    got, want = search((jac @ jac.mT).unsqueeze(0), shares, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert got[0, 0, 1] == 0
