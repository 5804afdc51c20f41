"""Hyper-parameters, dtypes, states and derivatives of the methods with memory."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import as_tree, close, double
from tests.matrices import B, matrix
from tests.registry import METHODS, fresh, losses_for
from torchjd_func import _tree

SWEEPS = {
    "excess_mtl": (lambda x: jd.excess_mtl(x), [0.1, 1.0]),
    "excess_mtl[n_warmup_steps]": (lambda x: jd.excess_mtl(1.0, x), [1.0, 2.0]),
    "moco[beta]": (lambda x: jd.moco(x), [0.2, 0.9]),
    "moco[gamma]": (lambda x: jd.moco(gamma=x, gamma_sigma=x), [0.01, 0.1]),
    "moco[rho]": (lambda x: jd.moco(rho=x), [0.0, 1.0]),
    "db_mtl": (lambda x: jd.db_mtl(x, sigma=x), [0.0, 0.9]),
    "gradnorm[alpha]": (lambda x: jd.gradnorm(x), [0.0, 5.0]),
    "gradnorm[lr]": (lambda x: jd.gradnorm(lr=x), [0.01, 0.1]),
    "smoothed": (lambda x: jd.smoothed(jd.mgda(), x), [0.1, 0.9]),
    "every": (lambda x: jd.every(jd.mgda(), x), [1, 3]),
    "graddrop": (lambda x: jd.graddrop(x.expand(3)), [0.0, 0.5]),
}


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyper_parameters_can_be_mapped(name, dtype):
    make, values = SWEEPS[name]
    jacs = [matrix("gaussian", 3, 5, seed).to(dtype) for seed in range(3)]

    def run(value):
        rule = make(value)
        state = rule.init(jacs[0], key=jd.random.key(0))
        grads = []
        for jac in jacs:
            grad, state = rule(jac, state, losses=double(1.0, 2.0, 0.5) * jac[:, 0].square())
            grads.append(grad)
        return grads[-1], state

    sweep = torch.tensor(values)
    got_grads, got_state = vmap(run)(sweep)
    for i, value in enumerate(sweep):
        grads, state = run(value)
        torch.testing.assert_close(got_grads[i], grads)
        for got, want in zip(got_state, state, strict=True):
            if isinstance(got, Tensor):
                torch.testing.assert_close(got[i], want)
    assert not torch.allclose(got_grads[0], got_grads[1])


@pytest.mark.parametrize(
    "rule",
    [jd.trimmed_mean(1), jd.graddrop(), jd.excess_mtl(), jd.moco(), jd.db_mtl()],
    ids=lambda rule: rule.name,
)
def test_complex_parameters_are_pairs_of_real_ones(rule):
    pairs = [matrix("gaussian", 3, 8, seed).reshape(3, 2, 2, 2) for seed in range(2)]
    losses, key = double(1.0, 2.0, 0.5), jd.random.key(0)
    state = rule.init(torch.view_as_complex(pairs[0]), key=key)
    want_state = rule.init(pairs[0], key=key)
    for pair in pairs:
        got, state = rule(torch.view_as_complex(pair), state, losses=losses)
        want, want_state = rule(pair, want_state, losses=losses)
        assert got.dtype == torch.complex128
        close(torch.view_as_real(got), want, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: jd.moco(beta=1.5), "beta"),
        (lambda: jd.moco(gamma=-1.0), "gamma"),
        (lambda: jd.db_mtl(beta=-0.1), "beta"),
        (lambda: jd.excess_mtl(-1.0), "robust_step_size"),
        (lambda: jd.gradnorm(lr=-1.0), "lr"),
        (lambda: jd.gradnorm(lr=math.nan), "lr"),
        (lambda: jd.smoothed(jd.mean(), 1.1), "alpha"),
        (lambda: jd.every(jd.mean(), 0), "k"),
    ],
)
def test_numbers_out_of_range_are_errors(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be in"):
        make()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_keeps_the_dtypes_that_it_began_with(name, dtype):
    method = METHODS[name]
    m = max(3, method.min_m)
    jac, losses = matrix("gaussian", m, 5), losses_for(method, m)
    aggregator, state = fresh(method, jac.float(), m)
    grads, after = aggregator(jac.to(dtype), state, losses=losses)
    assert grads.dtype == dtype
    assert [x.dtype for x in _tree.leaves(after)] == [x.dtype for x in _tree.leaves(state)]


def test_a_state_of_other_parameters_is_an_error():
    for rule in (jd.moco(), jd.db_mtl(), jd.excess_mtl()):
        state = rule.init(as_tree(B))
        with pytest.raises(ValueError, match="structure of the Jacobian"):
            rule(B, state, losses=double(1.0, 2.0, 3.0))
        with pytest.raises(ValueError, match=r"`state\.\w+\['a.0'\]` of"):
            rule({"z": [B], "a": (B, None)}, state, losses=double(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "rule",
    [
        jd.graddrop([0.1, 0.2, 0.3]),
        jd.trimmed_mean(1),
        jd.excess_mtl(),
        jd.moco(prescale=True),
        jd.db_mtl(),
        jd.smoothed(jd.gradnorm()),
    ],
    ids=lambda rule: rule.name,
)
def test_two_steps_can_be_differentiated(rule):
    jac, losses = matrix("gaussian", 3, 4), double(1.0, 2.0, 0.5)

    def second(jac):
        first, state = rule(jac, rule.init(jac, key=jd.random.key(0)), losses=losses)
        return rule(jac * (1 + first), state, losses=losses / 2)[0]

    assert torch.autograd.gradcheck(second, jac.requires_grad_())
    for kind in ("zero", "duplicate"):
        assert torch.func.jacrev(second)(matrix(kind, 3, 4)).isfinite().all()
    assert torch.func.jacrev(second)(torch.zeros(3, 4)).isfinite().all()
