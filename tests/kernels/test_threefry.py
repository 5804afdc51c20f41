"""Random words on a GPU: under Triton's interpreter where there is none, else on the device."""

import pytest
import torch

import torchjd_func as jd
from torchjd_func import _host, _threefry

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels.threefry import encrypt_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n_bits", [32, 53, 62])
def test_wide_words_are_those_of_the_host(n_bits):
    key = jd.random.key(2**33 + 5)
    got = encrypt_kernel(key.unsqueeze(0).to(DEVICE), _threefry.DRAW, 300, n_bits).cpu()
    want = _host.tensor(_threefry.wide_bits(key, (300,), n_bits))
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("n", [0, 1, 255, 700])
@pytest.mark.parametrize("stream", [_threefry.DRAW, _threefry.SPLIT])
def test_has_the_bits_of_the_host(n, stream):
    keys = torch.stack([jd.random.key(seed) for seed in (0, 7, -1, 2**40 + 3)])
    got = encrypt_kernel(keys.to(DEVICE), stream, n).cpu()
    want = [_host.tensor(_threefry.encrypt(key, stream, n)) for key in keys]
    assert torch.equal(got, torch.stack(want))
