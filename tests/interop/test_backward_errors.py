"""Wrong use of `backward_`: each error names the argument and the remedy."""

import pytest
from torch import nn

import torchjd_func as jd
from tests.interop.models import X, losses_of, network, tasks


def backward(losses, target, rule=None, **options):
    """Call `backward_` with a rule at hand."""
    return jd.interop.backward_(losses, target, rule or jd.upgrad(), **options)


def shared_twice():
    """Return a loss that goes around the features."""
    model = tasks()
    z, losses = model.losses(X)
    losses["a"] = losses["a"] + model.trunk[0].weight.sum()
    return backward(losses, model, features=z)


def nested_features():
    """Return features that depend on each other."""
    model = tasks()
    z, losses = model.losses(X)
    return backward(losses, model, features=[z, 2 * z])


def wrapped():
    """Return a call with a module that has the name of torch's wrapper."""
    kind = type("DistributedDataParallel", (nn.Sequential,), {})
    model = kind(network())
    return backward(losses_of(model(X)), model)


MODEL = network()
FROZEN = network().requires_grad_(False)
OUT = MODEL(X)
BAD = {
    "detached loss": (
        lambda: backward([OUT.mean(), OUT.detach().mean()], MODEL),
        r"`losses` at '1' must depend on parameters of `target`.*detach\(\)",
    ),
    "loss of another model": (
        lambda: backward([MODEL(X).mean(), network()(X).mean()], MODEL),
        "`losses` at '1' must depend on parameters of `target`",
    ),
    "loss of another model, batched": (
        lambda: backward([MODEL(X).mean(), network()(X).mean()], MODEL, chunk_size=None),
        "`losses` at '1' must depend on parameters of `target`",
    ),
    "loss of another model, in one pass": (
        lambda: backward([MODEL(X).mean(), network()(X).mean()], MODEL, jd.mean()),
        "`losses` at '1' must depend on parameters of `target`",
    ),
    "loss of another model, one loss": (
        lambda: backward(network()(X).mean(), MODEL, jd.scalarizers.mean()),
        "`losses` must depend on parameters of `target`",
    ),
    "parameters of functionalize": (
        lambda: backward(OUT.mean(0), jd.functionalize(MODEL)[1]),
        "`target` must hold parameters that require a gradient, got none. Pass the model itself",
    ),
    "frozen": (
        lambda: backward(FROZEN(X).mean(0), FROZEN),
        "`target` must hold parameters that require a gradient, got none",
    ),
    "no leaf": (lambda: backward(OUT.mean(0), [OUT]), "`target` at '0' must be a leaf"),
    "no parameter": (lambda: backward(OUT.mean(0), [3]), "`target` at '0' must be a parameter or"),
    "no losses": (lambda: backward([], MODEL), "`losses` must hold at least one number"),
    "numbers": (lambda: backward([1.0], MODEL), "must be a tensor, got float"),
    "no rule": (lambda: backward(OUT.mean(0), MODEL, jd.upgrad().weighting), "`rule` must be a"),
    "no key": (lambda: backward(MODEL(X).mean(0), MODEL, jd.gradvac()), "`key` must be given"),
    "another state": (
        lambda: backward(MODEL(X).mean(0), MODEL, jd.nash_mtl(), state=jd.pcd().init(X)),
        "`state` of `nash_mtl` must be a NashMTLState, got PCDState",
    ),
    "chunk size": (lambda: backward(OUT.mean(0), MODEL, chunk_size=0), "`chunk_size` must be"),
    "present": (lambda: backward(OUT.mean(0), MODEL, present=[True]), "must hold 5 bools"),
    "where without weights": (
        lambda: backward(OUT.mean(0), MODEL, jd.trimmed_mean(1), where=bool),
        "`where` must be given a rule with a weighting",
    ),
    "where of a scalarizer": (
        lambda: backward(OUT.mean(0), MODEL, jd.scalarizers.mean(), where=bool),
        "`where` must be given a jd.Aggregator",
    ),
    "where of nothing": (
        lambda: backward(MODEL(X).mean(0), MODEL, where=lambda path: False),
        "`where` must be true of the path of some parameter",
    ),
    "wrapped": (wrapped, r"`target` must not be wrapped.*jd\.distributed\.data_parallel"),
    "detached features": (
        lambda: backward(OUT.mean(0), MODEL, features=X),
        "`features` must depend on parameters of `target`",
    ),
    "a way around the features": (shared_twice, "`losses` at 'a' must reach the parameters"),
    "features of features": (nested_features, "`features` at '1' must not be computed from"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_wrong_use_is_refused_with_the_remedy(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert str(caught.value).endswith(".")
