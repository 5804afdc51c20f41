"""Roots on a GPU: under Triton's interpreter where there is none, else on the device."""

import pytest
import torch

import torchjd_func as jd
from tests.matrices import matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels.orthant import root_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOL = 1e-12


def roots(gramians, alpha, max_iter=30):
    """Find roots; return them with flags and steps, on the host."""
    power = torch.full((len(gramians),), 1 / alpha, dtype=torch.float64, device=DEVICE)
    shares = torch.arange(1, gramians.shape[-1] + 1, dtype=torch.float64, device=DEVICE)
    given = gramians.to(DEVICE), power, shares.expand(len(gramians), -1)
    return [part.cpu() for part in root_kernel(*given, TOL, max_iter)]


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_equals_the_search_of_the_host(alpha):
    jacs = torch.stack([matrix(kind, 5, 8, seed=1) for kind in ("gaussian", "scaled")])
    gramians = jacs @ jacs.mT
    gramians[0, 2] = gramians[0, :, 2] = 0
    value, converged, steps = roots(gramians, alpha)
    shares = torch.arange(1, 6, dtype=torch.float64)
    want = jd.linalg.orthant_root(gramians, alpha, preference=shares)
    assert converged.all() and want.converged.all()
    torch.testing.assert_close(value, want.value, rtol=1e-10, atol=0)
    assert ((steps - want.iterations).abs() <= 1).all()
    assert value[0, 2] == 0


@pytest.mark.parametrize("kind", ["stationary", "zero"])
def test_no_root_is_zero(kind):
    rows = matrix("gaussian", 4, 6)
    rows = 0 * rows if kind == "zero" else torch.cat([rows[:3], -rows[:3].sum(0, keepdim=True)])
    value, converged, _ = roots((rows @ rows.mT).unsqueeze(0), 1.0)
    assert (value == 0).all() and not converged.any()


def test_too_few_steps_are_seen():
    rows = matrix("scaled", 4, 6, seed=2)
    value, converged, _ = roots((rows @ rows.mT).unsqueeze(0), 5.0, max_iter=1)
    assert value.isnan().all() and not converged.any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_ends():
    gramians = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gramians[1, 0, 1] = torch.nan
    value, converged, _ = roots(gramians, 1.0)
    assert converged.tolist() == [True, False]
    want = torch.arange(1, 4, dtype=torch.float64).sqrt()
    torch.testing.assert_close(value[0], want)
