"""What a step leaves as it was, and a loop of `loss.backward()` trains, is named; nothing else is.

That is what is closed over instead of passed, and running statistics that are not returned.
"""

import re
import warnings

import pytest
import torch
from torch import nn

import torchjd_func as jd

TRUNK, HEAD = nn.Linear(3, 4), nn.Linear(4, 2)
TEACHER = nn.Linear(3, 4).requires_grad_(False)
APPLY, PARAMS, _ = jd.functionalize(TRUNK)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
SCALE = torch.ones(2, requires_grad=True)
OUTSIDE = r"not differentiated, of shapes \[{}\]"


def features(params, x):
    return APPLY(params, {}, x)[0].tanh()


def by_module(params, x):
    return HEAD(features(params, x)).square().mean(0)


def by_weights(params, x):
    return features(params, x)[:, :2].square().mean(0) * SCALE


def each(params, x):
    return HEAD(features(params, x)).square().sum(1)


def one(params, x):
    return (features(params, x)[:2] * SCALE).square().sum()


def head(params, z, x):
    return HEAD(z).square().mean(0)


MODULE, WEIGHTS = r"\(2, 4\), \(2,\)", r"\(2,\)"
OBJECTIVES = {
    "a module": (by_module, MODULE),
    "weights": (by_weights, WEIGHTS),
    "of examples": (jd.instancewise(each), MODULE),
    "of one example": (jd.per_example(one), WEIGHTS),
    "of microbatches": (jd.accumulate(by_module, 2), MODULE),
    "in another dtype": (jd.cast_floating(by_weights, torch.bfloat16), WEIGHTS),
    "of tasks": (jd.multitask(features, {"a": head}), MODULE),
}
RULES = {
    "rows": jd.config(),
    "gramian": jd.upgrad(),
    "size": jd.mean(),
    "scalarizer": jd.scalarizers.mean(),
}


def params_of(name):
    return (PARAMS, {"a": {}}) if name == "of tasks" else PARAMS


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_closed_over_is_named(name, rule):
    objective, shapes = OBJECTIVES[name]
    with pytest.warns(UserWarning, match=OUTSIDE.format(shapes)) as caught:
        jd.grad(objective, RULES[rule])(None, params_of(name), X)
    assert len(caught) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_named_before_a_graph_is_made(name):
    objective, shapes = OBJECTIVES[name]
    with pytest.warns(UserWarning, match=OUTSIDE.format(shapes)) as caught:
        jd.init_state(jd.upgrad(), objective, params_of(name), X)
    assert len(caught) == 1


def many(params, x):
    step = jd.grad(by_weights, jd.upgrad())
    return jd.ensemble.each(lambda params, x: step(None, params, x)[0], shared=(1,))(params, x)


def test_it_is_named_where_models_and_batches_are_many():
    with pytest.warns(UserWarning, match=OUTSIDE.format(WEIGHTS)):
        many(jd.ensemble.stack([PARAMS] * 2), X)
    with pytest.warns(UserWarning, match=OUTSIDE.format(MODULE)):
        jd.double_sampling(by_module, jd.modo(gamma=0.1))(None, PARAMS, (X,), (X,))


def partly_frozen():
    """Train half of a model, whose other half was overwritten when it was made."""
    first = nn.Linear(3, 4).requires_grad_(False)
    nn.init.zeros_(first.weight)
    model = nn.Sequential(first, nn.Linear(4, 2))
    apply, params, buffers = jd.functionalize(model)
    jd.grad(lambda p, x: apply(p, buffers, x)[0].square().mean(0), jd.upgrad())(None, params, X)


def on_features(params, z, *, scale=1.0):
    return (z @ params["w"] * scale).square().mean(0)


W = {"w": torch.ones(4, 2)}
PAST = r"The arguments \['{}'\] of the objective were computed from tensors that require"
COMPUTED = {
    "by position": (lambda step: step(W, TRUNK(X)), "1"),
    "in a tree": (lambda step: step(W, {"z": TRUNK(X)}["z"]), "1"),
    "by name": (lambda step: step(W, X[:, :1].repeat(1, 4), scale=2 * SCALE), "scale"),
    "for many models": (
        lambda step: jd.ensemble.each(lambda w, z: step({"w": w}, z))(
            torch.ones(2, 4, 2), torch.stack([TRUNK(X)] * 2)
        ),
        "1",
    ),
}


@pytest.mark.parametrize("rule", [jd.upgrad(), jd.scalarizers.mean()])
@pytest.mark.parametrize("name", COMPUTED)
def test_arguments_that_were_computed_by_what_is_trained_are_named(name, rule):
    call, path = COMPUTED[name]
    step = jd.grad(on_features, rule)
    with pytest.warns(UserWarning, match=PAST.format(path)) as caught:
        call(lambda *args, **kwargs: step(None, *args, **kwargs)[0])
    assert len(caught) == 1


def test_they_are_named_by_init_state():
    with pytest.warns(UserWarning, match=PAST.format("1")):
        jd.init_state(jd.upgrad(), on_features, W, TRUNK(X))


TRAINED = (
    jd.scalarizers.uw().init(torch.zeros(2))._replace(log_variance=nn.Parameter(torch.ones(2)))
)


def weighed_in_a_loop(state):
    w = nn.Parameter(torch.ones(4, 2))
    return jd.interop.backward_(
        on_features({"w": w}, X @ X.T[:, :4]), w, jd.scalarizers.uw(), state
    )


STEPS = {
    "grad": lambda state: jd.grad(on_features, jd.scalarizers.uw())(state, W, X @ X.T[:, :4])[1],
    "backward_": weighed_in_a_loop,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_state_that_is_to_be_trained_is_named(name):
    with pytest.warns(UserWarning, match=r"\['log_variance'\] of the state require a gradient"):
        state = STEPS[name](TRAINED)
    assert not state.log_variance.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STEPS[name](state)
        STEPS[name](TRAINED._replace(log_variance=2 * TRAINED.log_variance))  # a past, no more


LEARNED = {
    "weights": lambda w: jd.constant(w),
    "weights of a scalarizer": lambda w: jd.scalarizers.constant(w),
    "a preference": lambda w: jd.upgrad(w),
    "a preference by name": lambda w: jd.upgrad({"a": w[0], "b": w[1]}),
    "a preference of groups": lambda w: jd.grouped(jd.upgrad(w), jd.by_tensor),
    "a number": lambda w: jd.cagrad(w[0]),
}


@pytest.mark.parametrize("name", LEARNED)
def test_options_that_are_to_be_trained_are_named(name):
    def objective(params, z):
        return dict(zip("ab", on_features(params, z), strict=True))

    def step(weights, of_losses: torch.Tensor | float = 1.0):
        rule = LEARNED[name](weights)
        return jd.grad(lambda w, z: _scaled(objective(w, z), of_losses), rule)(None, W, TEACHER(X))

    weights = torch.tensor([0.2, 0.7], requires_grad=True)
    with pytest.warns(UserWarning, match=r"Options of the rule .* of shapes \[\(2,\)\]") as caught:
        step(weights)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="Losses depend on tensors") as caught:
        step(weights.detach(), weights[0])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(weights.detach())
        with torch.no_grad():
            step(weights)


def _scaled(losses, by):
    return {name: by * loss for name, loss in losses.items()}


def frozen(params, x):
    return (features(params, x) - TEACHER(x)).square().mean(0)


def without_grad(params, x):
    with torch.no_grad():
        target = HEAD(TRUNK(x))
    return (features(params, x)[:, :2] - target).square().mean(0)


def passed(params, x, scale):
    return features(params, x)[:, :2].square().mean(0) * scale


QUIET = {
    "partly frozen": partly_frozen,
    "frozen": lambda: jd.grad(frozen, jd.upgrad())(None, PARAMS, X),
    "under no_grad": lambda: jd.grad(without_grad, jd.upgrad())(None, PARAMS, X),
    "an argument": lambda: jd.grad(passed, jd.upgrad())(None, PARAMS, X, SCALE),
    "parameters of the module": lambda: jd.grad(frozen, jd.upgrad())(
        None, dict(TRUNK.named_parameters()), X
    ),
    "what another transform tracks": lambda: torch.func.grad(
        lambda scale: jd.grad(lambda p, x: passed(p, x, scale), jd.upgrad())(None, PARAMS, X)[0][
            "bias"
        ].sum()
    )(SCALE.detach()),
    "a measurement": lambda: jd.gramian(by_module)(PARAMS, X),
    "a measurement of features": lambda: jd.gramian(on_features)(W, TRUNK(X)),
    "features that were cut off": lambda: jd.grad(on_features, jd.upgrad())(
        None, W, TRUNK(X).detach()
    ),
    "parameters that were computed": lambda: jd.grad(on_features, jd.upgrad())(
        None, {"w": HEAD.weight.T}, TEACHER(X)
    ),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_constant_or_passed_is_not(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QUIET[name]()


class Average(nn.Module):
    """Subtracts a running mean, kept in a buffer that is written into, or replaced."""

    def __init__(self, replaced):
        super().__init__()
        self.scale, self.replaced = nn.Parameter(torch.ones(3)), replaced
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        h = self.scale * x
        if self.training and self.replaced:
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0).detach()
        elif self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return h - self.mean


MODULES = {
    "batch normalisation": lambda: nn.BatchNorm1d(3),
    "written into": lambda: Average(False),
    "replaced": lambda: Average(True),
}


@pytest.mark.parametrize("name", MODULES)
def test_statistics_come_back_and_the_module_keeps_its_own(name):
    model = MODULES[name]()
    apply, params, buffers = jd.functionalize(model)
    before = {name: x.clone() for name, x in model.named_buffers()}

    def objective(params, buffers, x):
        outputs, buffers = apply(params, buffers, x)
        return outputs.square().mean(0), buffers

    step = jd.grad(objective, jd.upgrad(), has_aux=True)
    _, after, _ = step(None, params, buffers, X)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(None, params, buffers, X)[1], after)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    model(X)
    torch.testing.assert_close(after, dict(model.named_buffers()))
    assert not any(x.requires_grad for x in after.values())


@pytest.mark.parametrize("name", MODULES)
def test_statistics_that_are_dropped_are_named(name):
    model = MODULES[name]()
    apply, params, buffers = jd.functionalize(model)
    step = jd.grad(lambda params, x: apply(params, buffers, x)[0].square().mean(0), jd.upgrad())
    names = re.escape(str(sorted(buffers)))
    with pytest.warns(UserWarning, match=rf"overwrote the buffers {names}.*pass has_aux=True"):
        step(None, params, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_with = jd.grad(lambda p, b, x: (x @ p["w"], b), jd.upgrad(), has_aux=True)
        step_with(None, {"w": torch.ones(3)}, buffers, X)
        model.eval()
        step(None, params, X)
