"""Preferences are mapped, and batches nest; each method over matrices: `test_contract.py`."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.matrices import matrix
from tests.registry import METHODS, run


@pytest.mark.parametrize("factory", [jd.upgrad, jd.dualproj, jd.constant])
def test_preferences_can_be_mapped(factory, device):
    jac = matrix("gaussian", 3, 5, device=device)
    preferences = jd.random.uniform(jd.random.key(0, device=device), (4, 3)).double() + 0.1
    got = vmap(lambda b: factory(b)(jac)[0])(preferences)
    want = torch.stack([factory(b)(jac)[0] for b in preferences])
    torch.testing.assert_close(got, want)


def test_batches_nest(device):
    jac = matrix("gaussian", 3, 5, device=device)
    batch = jac * torch.tensor([[1.0], [2.0]]).to(jac)[:, :, None, None]
    got = vmap(vmap(lambda jac: jd.upgrad()(jac)[0]))(batch)
    want = run(METHODS["upgrad"], jac, 3)
    torch.testing.assert_close(got, torch.stack([want, 2 * want]).unsqueeze(1))
