"""Jacobi's method for a GPU: under Triton's interpreter where there is none, else on the device."""

import pytest
import torch

from tests.matrices import KINDS, matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels.eigh import eigh_kernel
from torchjd_func.linalg import _eigh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("m", "kinds"), [(1, KINDS), (3, KINDS), (7, ["gaussian", "duplicate"]), (12, ["low_rank"])]
)
def test_gives_back_the_matrix(m, kinds):
    jacs = torch.stack([matrix(kind, m, 5, seed=m) for kind in kinds])
    gramians = (jacs @ jacs.mT).to(DEVICE)
    values, vectors = eigh_kernel(gramians)
    size = gramians.abs().amax((1, 2))
    again = (vectors * values.unsqueeze(1)) @ vectors.mT
    assert ((again - gramians).abs().amax((1, 2)) <= 1e-13 * size).all()
    identity = torch.eye(m, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(vectors.mT @ vectors, identity.expand_as(gramians))
    want = torch.linalg.eigvalsh(gramians)
    assert (values.diff() >= 0).all()
    assert ((values - want).abs().amax(1) <= 1e-13 * size).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, in the interpreter
def test_what_is_not_finite_stays_its_own():
    matrices = torch.eye(3, dtype=torch.float64, device=DEVICE).repeat(2, 1, 1)
    matrices[1, 0, 1] = matrices[1, 1, 0] = torch.nan
    values, vectors = eigh_kernel(matrices)
    assert values[0].tolist() == [1, 1, 1]
    assert values[1].isnan().all() and vectors[1].isnan().all()


def test_both_operations_map():
    jacs = torch.stack([matrix("gaussian", 3, 4, seed) for seed in range(2)])
    gramians = (jacs @ jacs.mT).to(DEVICE)
    want, _ = torch.linalg.eigh(gramians)
    for operation in (_eigh._IN_KERNEL, _eigh._ON_HOST):
        values, _ = torch.func.vmap(operation)(gramians)
        torch.testing.assert_close(values, want)
