"""At the border: checkpoints, optimisers of torch, schedules of hyper-parameters."""

import io

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, clone, compiled
from tests.matrices import A
from tests.registry import METHODS, fresh
from torchjd_func import _tree

PARAMS = {"w": torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses_of(params, x):
    return (x @ params["w"]).sin().square().mean(0)


def through_a_file(saved):
    """Save and load as an untrusted file is loaded."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def different(state):
    """Return a state of the same layout, with other numbers."""
    return _tree.map(
        lambda leaf: torch.ones_like(leaf) if leaf.is_floating_point() else leaf, state
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_every_method_goes_through_a_file(name):
    method = METHODS[name]
    m = max(3, method.min_m)
    rows = torch.randn(m, A.shape[1], generator=torch.Generator().manual_seed(2)).double()
    aggregator, state = fresh(method, rows, m)
    losses = torch.linspace(1, 2, m, dtype=torch.float64)
    _, state = aggregator(rows, state, losses=losses)
    before = clone(state)
    saved = through_a_file(jd.interop.state_dict(state))
    assert all(isinstance(tensor, torch.Tensor) for tensor in saved.values())
    loaded = jd.interop.load_state_dict(different(state), saved)
    assert_same_layout(loaded, state)
    assert_trees_close(loaded, before, rtol=0, atol=0)
    assert_trees_close(
        aggregator(rows, loaded, losses=losses), aggregator(rows, state, losses=losses)
    )


def test_names_are_those_of_fields_and_keys():
    state = jd.smoothed(jd.gradvac()).init(A, key=jd.random.key(0))
    both = {"rule": state, "scale": jd.loss_scale.init(), "momentum": [PARAMS]}
    names = set(jd.interop.state_dict(both))
    assert {"rule.weights", "scale.good_steps", "momentum.0.w"} <= names
    assert any(name.startswith("rule.inner.") for name in names)
    assert jd.interop.state_dict(()) == {}
    assert jd.interop.load_state_dict((), {}) == ()


def test_training_goes_on_where_it_was_saved():
    rule = jd.smoothed(jd.mgda())
    step = jd.grad(losses_of, rule)

    def train(params, state, n):
        for _ in range(n):
            grads, state = step(state, params, X)
            params = _tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, state

    initial = jd.init_state(rule, losses_of, PARAMS, X)
    whole = train(PARAMS, initial, 6)
    half = train(PARAMS, initial, 3)
    saved = through_a_file(jd.interop.state_dict(half))
    params, state = jd.interop.load_state_dict((PARAMS, initial), saved)
    assert_trees_close(train(params, state, 3), whole, rtol=0, atol=0)


SAVED = {"a": torch.ones(2), "b": torch.tensor(0)}
BAD = {
    "missing": ({"a": SAVED["a"]}, r"saved.*missing \['b'\]"),
    "unexpected": (SAVED | {"c": SAVED["a"]}, r"saved.*unknown \['c'\]"),
    "of another shape": (SAVED | {"a": torch.ones(3)}, r"\(2,\) at 'a', got \(3,\)"),
    "of another dtype": (SAVED | {"b": torch.tensor(0.0)}, "int64 at 'b', got torch.float32"),
}


@pytest.mark.parametrize(("saved", "message"), BAD.values(), ids=BAD)
def test_a_dict_that_does_not_fit_is_refused_by_name(saved, message):
    with pytest.raises(ValueError, match=message):
        jd.interop.load_state_dict(SAVED, saved)


def test_a_state_that_has_no_names_is_refused():
    with pytest.raises(ValueError, match=r"one leaf of each name, got \['a.b'\] twice"):
        jd.interop.state_dict({"a.b": X, "a": {"b": X}})
    with pytest.raises(TypeError, match="tensors only, got int at 'n'"):
        jd.interop.state_dict({"n": 3})


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_torch_optimisers_step_with_assigned_gradients(kind, options):
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    twin.load_state_dict(model.state_dict())
    apply, params, buffers = jd.functionalize(model)
    step = jd.grad(lambda p, x: apply(p, buffers, x)[0].square().mean(0), jd.mean())
    optimizer, other = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    for _ in range(4):
        grads, _ = step(None, params, X)  # `params` share memory with the model
        jd.interop.assign_grads_(model, grads)
        optimizer.step()
        other.zero_grad()
        twin(X).square().mean().backward()
        other.step()
    assert_trees_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-12)


def test_schedules_of_hyper_parameters_do_not_recompile():
    def step(params, c, beta, lr, x):
        rule = jd.smoothed(jd.cagrad(c), beta)
        grads, losses, _ = jd.grad_and_value(losses_of, rule)(None, params, x)
        return _tree.map(lambda p, g: p - lr * g, params, grads), losses

    fast, counter = compiled(step)
    params = slow = PARAMS
    for i in range(5):
        c, beta, lr = torch.tensor([0.1 * i, 0.9 - 0.1 * i, 0.1 / (1 + i)]).unbind()
        params, _ = fast(params, c, beta, lr, X)
        slow, _ = step(slow, c, beta, lr, X)
    assert_trees_close(params, slow)
    assert counter.graphs == 1
