"""Gradients in the hands of torch's optimisers, and schedules of hyper-parameters."""

from typing import Any, cast

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_trees_close, clone, compiled
from torchjd_func import _tree

PARAMS = {"w": torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses_of(params, x):
    return (x @ params["w"]).sin().square().mean(0)


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


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
        jd.interop.assign_grads_(model, grads, optimizer=optimizer)
        optimizer.step()
        other.zero_grad()
        twin(X).square().mean().backward()
        other.step()
    assert_trees_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-12)


def two_tasks():
    """Return a trunk, heads, and the parameters of all."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
    modules = [trunk, *heads.values()]
    return trunk, heads, [param for module in modules for param in module.parameters()]


def like(module):
    """Return a gradient of ones for each parameter, by name."""
    return {name: torch.ones_like(param) for name, param in module.named_parameters()}


def test_trees_of_modules_get_the_gradients_of_their_parts():
    trunk, heads, params = two_tasks()
    grads = (like(trunk), {"b": like(heads["b"]), "a": like(heads["a"])})
    jd.interop.assign_grads_((trunk, heads), grads, optimizer=torch.optim.SGD(params))
    assert all(param.grad is not None and param.grad.eq(1).all() for param in params)


@pytest.mark.parametrize("absent", [None, {"weight": None, "bias": None}], ids=["part", "leaves"])
def test_adamw_neither_moves_nor_decays_an_absent_head(absent):
    trunk, heads, params = two_tasks()
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    full = (like(trunk), {"a": like(heads["a"]), "b": like(heads["b"])})
    jd.interop.assign_grads_((trunk, heads), full, optimizer=optimizer)
    optimizer.step()  # from here on all have momentum
    before = clone([p.detach() for p in params])
    grads = (like(trunk), {"a": like(heads["a"]), "b": absent})
    jd.interop.assign_grads_((trunk, heads), grads, optimizer=optimizer)
    assert all(param.grad is None for param in heads["b"].parameters())
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [True] * 4 + [False] * 2


def test_a_parameter_that_stands_in_two_places_gets_the_sum():
    w = parameter(1.0)
    grads = {"a": torch.tensor([10.0]), "b": torch.tensor([1.0])}
    jd.interop.assign_grads_({"a": w, "b": w}, grads)
    assert w.grad is not None
    assert w.grad.item() == 11
    assert grads["a"].item() == 10
    jd.interop.assign_grads_({"a": w, "b": w}, {"a": None, "b": grads["b"]})
    assert w.grad.item() == 1
    tied: Any = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    tied["b"].weight = tied["a"].weight
    one = torch.ones(1, 1)
    jd.interop.assign_grads_(tied, {"a.weight": one, "b.weight": 2 * one})
    assert torch.equal(tied["a"].weight.grad, 3 * one)


def test_what_clips_in_place_changes_no_gradient_but_its_own():
    w, grads = parameter(0.0, 0.0), torch.tensor(30.0).expand(2)
    jd.interop.assign_grads_(w, grads)
    nn.utils.clip_grad_norm_([w], 1.0)
    assert grads.tolist() == [30, 30]


def test_parameters_of_functionalize_are_no_target():
    model = nn.Linear(2, 1)
    _, params, _ = jd.functionalize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"require a gradient at 'weight'.*Pass the model itself"):
        jd.interop.assign_grads_(params, like(model), optimizer=optimizer)
    assert model.bias.grad is None


def test_a_parameter_frozen_later_is_no_target():
    model = nn.Linear(2, 1)
    grads = like(model)
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"at 'weight'.*frozen since jd.functionalize: call that"):
        jd.interop.assign_grads_(model, grads)
    assert model.bias.grad is None


def test_a_model_that_was_replaced_is_not_the_optimizers():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = nn.Linear(2, 1, dtype=torch.float64)
    message = r"`target` at 'weight' must be a parameter of `optimizer`.*model.to"
    with pytest.raises(ValueError, match=message):
        jd.interop.assign_grads_(model, {"weight": torch.ones(1, 2)}, optimizer=optimizer)
    assert model.weight.grad is None


W = nn.Linear(2, 1)
BAD = {
    "no leaf": (lambda: (2 * W.weight, torch.ones(1, 2)), "`target` must be a leaf"),
    "not a module": (lambda: ({"a": 3}, {"a": W.bias}), "`target` at 'a' must be a parameter or"),
    "another name": (lambda: ((W,), ({"nope": W.bias},)), "unknown \\['nope'\\]"),
    "another structure": (lambda: ({"a": W}, [like(W)]), "structure of the target"),
    "another length": (lambda: ([W, W], [like(W)]), "structure of the target"),
    "another shape": (lambda: ((W,), ({"bias": W.weight},)), r"\(1,\) at '0.bias', got \(1, 2\)"),
    "no tensor": (lambda: (W.bias, 3.0), "`grads` must be a tensor or None"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_wrong_targets_and_gradients_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jd.interop.assign_grads_(*make())
    assert W.weight.grad is None
    assert W.bias.grad is None


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


def test_several_optimizers_are_told_apart():
    model = nn.Linear(2, 1)
    optimizers: Any = [torch.optim.SGD([param], lr=0.1) for param in model.parameters()]
    with pytest.raises(TypeError, match=r"`optimizer` must be.*got list\. Call it once for each"):
        jd.interop.assign_grads_(model, like(model), optimizer=optimizers)
    for optimizer, name in zip(optimizers, ["weight", "bias"], strict=True):
        jd.interop.assign_grads_(model, {name: like(model)[name]}, optimizer=optimizer)
    assert all(param.grad is not None for param in model.parameters())


def test_a_gradient_of_a_real_parameter_is_real():
    with pytest.raises(TypeError, match=r"`grads` must be real at 'bias'.*complex64"):
        jd.interop.assign_grads_(nn.Linear(2, 1), {"bias": torch.ones(1, dtype=torch.complex64)})


def test_what_was_frozen_stands_still():
    """Also where the gradient of the last step before is still there."""
    first = nn.Linear(3, 2)
    model = nn.Sequential(first, nn.Linear(2, 2))
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(4, 3)
    for frozen in (False, True):
        first.requires_grad_(not frozen)
        apply, params, buffers = cast(Any, jd.functionalize(model))
        before = first.weight.detach().clone()

        def objective(params, apply=apply, buffers=buffers):
            return apply(params, buffers, x)[0].square().mean(0)

        grads, _ = jd.grad(objective, jd.upgrad())(None, params)
        jd.interop.assign_grads_(model, grads, optimizer=optimizer)
        optimizer.step()
    assert torch.equal(first.weight, before)
    assert first.weight.grad is None
