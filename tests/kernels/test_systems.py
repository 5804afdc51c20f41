"""Inverses on a GPU: under Triton's interpreter where there is none, else on the device."""

import pytest
import torch

from tests.matrices import matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels.systems import inverse_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("m", [1, 2, 9])
def test_inverts(m):
    matrices = torch.stack([matrix("gaussian", m, m, seed) for seed in range(2)])
    matrices[0, 0, 0] = 0.0 if m > 1 else 3.0  # a pivot that has to be exchanged
    got = inverse_kernel(matrices.to(DEVICE)).cpu()
    torch.testing.assert_close(got, torch.linalg.inv(matrices), rtol=1e-9, atol=1e-9)
