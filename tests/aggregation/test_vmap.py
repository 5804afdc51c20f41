"""Preferences are mapped, and batches nest; each method over matrices: `test_contract.py`."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import torchjd_func as jd
from tests.matrices import matrix
from tests.registry import METHODS, fresh, losses_for, run


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


@pytest.mark.parametrize("name", [name for name, own in METHODS.items() if own.differentiable])
def test_derivatives_can_be_mapped(name, device):
    method = METHODS[name]
    m = max(3, method.min_m)
    batch = torch.stack([matrix("gaussian", m, 7, seed, device=device) for seed in range(2)])
    along, losses = batch.flip(0), losses_for(method, m)
    losses = None if losses is None else losses.to(device)
    aggregator, state = fresh(method, batch[0], m)

    def number(jac):
        return aggregator(jac, state, losses=losses)[0].square().sum()

    def pushed(jac, tangent):
        return jvp(number, (jac,), (tangent,))[1]

    slopes = torch.stack([grad(number)(jac) for jac in batch])
    torch.testing.assert_close(vmap(grad(number))(batch), slopes)
    got = vmap(pushed)(batch, along)
    torch.testing.assert_close(got, (slopes * along).sum((-2, -1)))
