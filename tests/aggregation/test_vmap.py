"""Every method under vmap equals a loop: over matrices, states and keys, and over preferences."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_trees_close
from tests.matrices import matrix
from tests.registry import METHODS, losses_for, run
from torchjd_func import _tree


@pytest.mark.parametrize("name", METHODS)
def test_vmap_equals_loop(name):
    method = METHODS[name]
    m = max(3, method.min_m)
    aggregator = method.make(m)
    batch = torch.stack([matrix(kind, m, 6, seed=5) for kind in ("gaussian", "scaled", "zero")])
    keys = jd.random.split(jd.random.key(0), len(batch)) if method.random else None
    losses = losses_for(method, m)

    def two_steps(jac, key):
        state = aggregator.init(jac, key=key)
        first, state = aggregator(jac, state, losses=losses)
        second, state = aggregator(jac.flip(-1), state, losses=losses)
        return first, second, state

    got = vmap(two_steps, in_dims=(0, None if keys is None else 0))(batch, keys)
    loop = [two_steps(jac, None if keys is None else keys[i]) for i, jac in enumerate(batch)]
    assert_trees_close(got, _tree.stack(loop), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factory", [jd.upgrad, jd.dualproj, jd.constant])
def test_preferences_can_be_mapped(factory):
    jac = matrix("gaussian", 3, 5)
    preferences = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double() + 0.1
    got = vmap(lambda b: factory(b)(jac)[0])(preferences)
    want = torch.stack([factory(b)(jac)[0] for b in preferences])
    torch.testing.assert_close(got, want)


def test_batches_nest():
    jac = matrix("gaussian", 3, 5)
    batch = jac * torch.tensor([[1.0], [2.0]], dtype=jac.dtype)[:, :, None, None]
    got = vmap(vmap(lambda jac: jd.upgrad()(jac)[0]))(batch)
    want = run(METHODS["upgrad"], jac, 3)
    torch.testing.assert_close(got, torch.stack([want, 2 * want]).unsqueeze(1))
