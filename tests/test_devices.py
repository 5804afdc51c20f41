"""What is computed stays on the device of its arguments, and waits for none: without a GPU.

Rules run on fake tensors that say they are on CUDA. Those have no derivatives without its library,
so transforms run on the meta device, which has no numbers to wait for.
"""

import pytest
import torch
from torch.func import grad, jvp, vmap

import torchjd_func as jd
from tests import scalarizer_registry
from tests.launches import counted
from tests.registry import METHODS, exported
from torchjd_func import _host, _tree

M = 6
ON_HOST = {"epo", "pmgda"}  # the linear programs
FAKE = {"device": "cuda", "dtype": torch.float64}


def assert_on(device, tree):
    """Check where all tensors are."""
    places = {leaf.device.type for leaf in _tree.leaves(tree)}
    assert places <= {device}


@pytest.mark.parametrize("name", METHODS)
def test_rules_with_a_key_and_options_of_the_host(name):
    method = METHODS[name]
    rule = method.make(M)
    with counted() as counter:
        jac = {
            "a": torch.empty(M, 10, device="cuda"),
            "b": torch.empty(M, 7, 2, device="cuda", dtype=torch.bfloat16),
        }
        losses = torch.empty(M, device="cuda") if method.needs_losses else None
        present = torch.empty(M, device="cuda", dtype=torch.bool)
        _, state = rule(jac, rule.init(jac, key=method.key(0)), losses=losses, present=present)
        counter.waits.clear()  # constants are copied once
        assert_on("cuda", (state, rule(jac, state, losses=losses, present=present)))
    assert bool(counter.waits) == (exported(name) in ON_HOST), counter.waits


@pytest.mark.parametrize("name", scalarizer_registry.METHODS)
def test_scalarizers_with_a_key_and_options_of_the_host(name):
    method = scalarizer_registry.METHODS[name]
    rule = method.make(M)
    with counted() as counter:
        losses = {str(i): torch.empty((), device="cuda") for i in range(M)}
        present = torch.empty(M, device="cuda", dtype=torch.bool)
        state = rule.init(losses, key=method.key(0))
        _, state = rule(losses, state, present=present)
        if rule.observe is not None:
            state = rule.observe(losses, state)
        counter.waits.clear()
        assert_on("cuda", (state, rule(losses, state, present=present)))
    assert not counter.waits


def watched(transform, x):
    """Call a function under a transform; say whether a kernel without derivatives may be used."""
    seen = []

    def fn(x):
        seen.append(_host._constant(x))
        return x.square().sum()

    transform(fn)(x)
    return not all(seen)


WATCHING = {
    "nothing": (lambda fn: fn, False),
    "vmap": (vmap, False),
    "vmap of vmap": (lambda fn: vmap(vmap(fn)), False),
    "grad": (grad, True),
    "vmap of grad": (lambda fn: vmap(grad(fn)), True),
    "grad of vmap": (lambda fn: grad(lambda x: vmap(fn)(x).sum()), True),
    "jvp": (lambda fn: lambda x: jvp(fn, (x,), (x,)), True),
    "vmap of jvp": (lambda fn: vmap(lambda x: jvp(fn, (x,), (x,))), True),
}


@pytest.mark.parametrize("name", WATCHING)
def test_kernels_without_derivatives_may_be_mapped_but_not_differentiated(name):
    transform, want = WATCHING[name]
    x = torch.ones(2, 3, 4)
    assert watched(transform, x) == want
    assert watched(transform, x.requires_grad_())


MEASURES = [name for name in jd.measures.__all__ if callable(getattr(jd.measures, name))]


@pytest.mark.parametrize("name", MEASURES)
def test_measures(name):
    rule = jd.monitored(jd.upgrad(), {name: getattr(jd.measures, name)})
    with counted() as counter:
        jac, losses = torch.empty(M, 9, **FAKE), torch.empty(M, **FAKE)
        assert_on("cuda", rule(jac, rule.init(jac), losses=losses))
    assert not counter.waits


ONES = torch.ones(2, dtype=torch.float64)
SETS = {
    "moo_svgd": jd.sets.moo_svgd(),
    "stch_set": jd.sets.stch_set(),
    "hypervolume_gradient": jd.sets.hypervolume_gradient(2 * ONES),
    "pareto_mtl": jd.sets.pareto_mtl(torch.eye(3, 2, dtype=torch.float64) + 0.1),
}


@pytest.mark.parametrize("name", SETS)
def test_sets(name):
    with counted() as counter:
        got = SETS[name](torch.empty(3, 2, 9, **FAKE), losses=torch.empty(3, 2, **FAKE))
        assert_on("cuda", got)
    assert not counter.waits


def empty(*shape):
    """Return a tensor without numbers."""
    return torch.empty(*shape, device="meta")


PARAMS = {"w": empty(5, 3), "b": empty(5), "v": empty(4, 5)}
X, Y = empty(8, 3), empty(8, 4)


def of_each_example(params, x, y):
    """Return a loss for each example."""
    hidden = torch.tanh(x @ params["w"].mT + params["b"])
    return (hidden @ params["v"].mT - y).square().mean(-1)


def four(params, x, y):
    """Return a loss for each output."""
    hidden = torch.tanh(x @ params["w"].mT + params["b"])
    return dict(zip("abcd", (hidden @ params["v"].mT - y).square().mean(0), strict=True))


def scaled(params, x, y):
    """Take a step with a scaled loss."""
    scale = jd.loss_scale.init(device="meta")
    grads, _ = jd.grad(jd.loss_scale.scaled(four, scale), jd.upgrad())(None, params, x, y)
    scale = jd.loss_scale.update(scale, grads)
    return jd.loss_scale.keep(scale, grads, params), scale


def several(params, x, y):
    """Take a step of each model of a set."""
    step = jd.grad(four, jd.upgrad())
    each = jd.ensemble.each(lambda p, x, y: step(None, p, x, y)[0], shared=(1, 2))
    return each(jd.ensemble.stack([params, params]), x, y)


def monitored(params, x, y):
    """Take a step that is measured, with a state."""
    rule = jd.monitored(
        jd.grouped(jd.upgrad(), jd.by_tensor), {"cosine": jd.measures.cosine_to_mean}
    )
    state = jd.init_state(rule, four, params, x, y)
    return jd.grad_and_value(four, rule)(state, params, x, y)


def twice(params, x, y):
    """Weigh by one batch the gradients of another."""
    return jd.double_sampling(four, jd.modo())(None, params, (x, y), (x, y))


EACH = jd.instancewise(of_each_example, check=False)  # a proof reads numbers
STEPS = {
    "jac": jd.jac(four),
    "gramian": jd.gramian(four),
    "gramian[product]": jd.gramian(four, route="product"),
    "gramian[instancewise]": jd.gramian(EACH),
    "row_norms": jd.row_norms(EACH),
    "cross_gramian": lambda p, x, y: jd.cross_gramian(four)(p, (x, y), (x, y)),
    "grad": lambda *args: jd.grad(four, jd.cagrad())(None, *args),
    "grad[scalarizer]": lambda *args: jd.grad(four, jd.scalarizers.stch())(None, *args),
    "grad[instancewise]": lambda *args: jd.grad(EACH, jd.clipped_mean(1.0))(None, *args),
    "grad[accumulate]": lambda *args: jd.grad(jd.accumulate(four, 2), jd.upgrad())(None, *args),
    "loss_scale": scaled,
    "ensemble": several,
    "monitored": monitored,
    "double_sampling": twice,
}


@pytest.mark.parametrize("name", STEPS)
def test_transforms(name):
    assert_on("meta", STEPS[name](PARAMS, X, Y))
