"""Scalarizers against TorchJD."""

import math

import pytest
import torch
from torch.func import vmap
from torchjd import scalarization as tj

import torchjd_func as jd
from tests.scalarizer_registry import (
    LB,
    assert_close,
    draws,
    gradient,
    vec,
)
from torchjd_func import scalarizers as sc
from torchjd_func.scalarization._uncertainty import IMTLLState, UWState


def both(scalarizer, state, peer, values):
    """Compare value and gradient with those of TorchJD; return the next state."""
    leaf = values.clone().requires_grad_()
    want = peer(leaf)
    (slope,) = torch.autograd.grad(want, leaf)
    loss, later = scalarizer(values, state)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(scalarizer, values, state), slope.reshape(values.shape), rtol=1e-11, atol=1e-12
    )
    return later


STATELESS = [
    (lambda w, z: sc.mean(), lambda w, z: tj.Mean()),
    (lambda w, z: sc.sum(), lambda w, z: tj.Sum()),
    (lambda w, z: sc.constant(w), lambda w, z: tj.Constant(w)),
    (lambda w, z: sc.geometric_mean(), lambda w, z: tj.GeometricMean()),
    (lambda w, z: sc.cosmos(w, 3.0), lambda w, z: tj.COSMOS(3.0, w)),
    (lambda w, z: sc.stch(0.3), lambda w, z: tj.STCH(0.3)),
    (lambda w, z: sc.stch(0.02, w, z), lambda w, z: tj.STCH(0.02, w, z)),
]


@pytest.mark.parametrize(("make", "peer"), STATELESS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_parity_without_state(make, peer, m):
    w, z = draws(1, m)[0], -draws(2, m)[1]
    for values in draws(10, m):
        both(make(w, z), None, peer(w, z), values)


@pytest.mark.parametrize("m", [2, 5])
def test_parity_of_pbi_but_for_its_constant(m):
    w, z = draws(1, m)[0], -draws(2, m)[1]
    for values in draws(10, m):
        leaf = values.clone().requires_grad_()
        want = tj.PBI(5.0, w, z)(leaf)
        (slope,) = torch.autograd.grad(want, leaf)
        got = sc.pbi(w, z)(values)[0]
        assert 0 <= float(want.detach() - got) <= 5e-6
        torch.testing.assert_close(gradient(sc.pbi(w, z), values, None), slope, rtol=1e-8, atol=0)


def test_parity_of_learned_scales():
    for make, peer, field, state in (
        (sc.uw, tj.UW(3), "log_var", UWState),
        (sc.imtl_l, tj.IMTLL(3), "log_scale", IMTLLState),
    ):
        peer.double()
        for values, s in zip(draws(5, 3), draws(10, 3)[5:].log(), strict=True):
            getattr(peer, field).data = s.clone()
            both(make(), state(s), peer, values)
            (want,) = torch.autograd.grad(peer(values), list(peer.parameters()))
            got = torch.func.grad(lambda st, v=values, make=make: make()(v, st)[0])(state(s))
            torch.testing.assert_close(got[0], want)


def test_parity_of_dwa():
    scalarizer, peer = sc.dwa(1.5), tj.DWA(1.5)
    assert scalarizer.observe is not None
    state = scalarizer.init(vec(LB))
    for epoch in draws(15, 3).reshape(5, 3, 3):
        for values in epoch:
            state = both(scalarizer, state, peer, values)
        state = scalarizer.observe(None, state)
        peer.step()


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.1])
def test_parity_of_famo(gamma):
    bounds = vec([-0.1, 0.0, -2.0])
    scalarizer = sc.famo(0.05, gamma, min_losses=bounds)
    peer = tj.FAMO(3, bounds, 0.05, gamma).double()
    assert scalarizer.observe is not None
    state = scalarizer.init(vec(LB))
    for before, after in draws(60, 3).reshape(30, 2, 3):
        state = both(scalarizer, state, peer, before)
        state = scalarizer.observe(after, state)
        peer.update(after)
        torch.testing.assert_close(state.logits, peer._w.detach(), rtol=1e-9, atol=1e-12)


def test_random_has_the_distribution_of_softmax_of_normals():
    scalarizer, n = sc.random(), 20_000
    keys = jd.random.split(jd.random.key(5), n)
    ours = vmap(lambda key: gradient(scalarizer, vec(LB), scalarizer.init(vec(LB), key=key)))(keys)
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(n, 3, generator=generator, dtype=torch.float64).softmax(-1)
    assert_close(ours.mean(0), [1 / 3, 1 / 3, 1 / 3], atol=5 * 0.17 / math.sqrt(n))
    torch.testing.assert_close(ours.T.cov(), theirs.T.cov(), rtol=0, atol=2e-3)
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(
        ours[:, 0].quantile(quantiles), theirs[:, 0].quantile(quantiles), rtol=0, atol=1e-2
    )


def test_random_draws_anew_at_every_call():
    scalarizer = sc.random()
    state = scalarizer.init(vec(LB), key=jd.random.key(1))
    seen = []
    for _ in range(5):
        loss, state = scalarizer(vec(LB), state)
        assert 1.0 <= float(loss) <= 4.0
        seen.append(float(loss))
    assert len(set(seen)) == 5
