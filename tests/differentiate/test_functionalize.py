"""Modules as pure functions, and gradients back to optimisers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_trees_close, clone, compiled


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_equals_the_module_and_is_detached():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    apply, params, buffers = jd.functionalize(model)
    x = torch.randn(5, 3)
    outputs, after = apply(params, buffers, x)
    torch.testing.assert_close(outputs, model(x))
    assert not outputs.requires_grad
    assert after == {}


def test_batch_norm_buffers_are_returned_and_inputs_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    apply, params, buffers = jd.functionalize(model)
    before = clone((params, buffers))
    x = torch.randn(6, 3)

    def objective(params, buffers, x):
        outputs, buffers = apply(params, buffers, x)
        return outputs.square().mean(0), buffers

    step = jd.grad_and_value(objective, jd.upgrad(), has_aux=True)
    _, (_, after), _ = step(None, params, buffers, x)
    assert_trees_close((params, buffers), before, rtol=0, atol=0)
    model(x)
    assert_trees_close(after, dict(model.named_buffers()), rtol=1e-6)
    fast, counter = compiled(step)
    assert_trees_close(fast(None, params, buffers, x), step(None, params, buffers, x), rtol=1e-5)
    assert counter.graphs == 1


def test_a_module_without_buffers_compiles_with_its_empty_dict():
    apply, params, buffers = jd.functionalize(nn.Linear(3, 2))
    assert buffers == {}

    def objective(params, buffers, x):
        outputs, buffers = apply(params, buffers, x)
        return outputs.square().mean(0), {"buffers": buffers, "nested": {"none": {}}}

    step = jd.grad_and_value(objective, jd.upgrad(), has_aux=True)
    fast, counter = compiled(step)
    x = torch.randn(4, 3)
    assert_trees_close(fast(None, params, buffers, x), step(None, params, buffers, x), rtol=1e-5)
    assert counter.graphs == 1


def test_tied_weights_are_listed_once_with_their_whole_gradient():
    model = Tied().double()
    apply, params, buffers = jd.functionalize(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert list(params) == ["first.weight"]
    grads, _ = jd.grad(lambda p: apply(p, buffers, x)[0].square().mean(), jd.mean())(None, params)
    model(x).square().mean().backward()
    torch.testing.assert_close(grads["first.weight"], model.first.weight.grad)


def test_keyword_arguments_reach_the_module():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    apply, params, buffers = jd.functionalize(attention)
    x = torch.randn(2, 3, 4)
    (outputs, weights), _ = apply(params, buffers, x, x, x, need_weights=False)
    assert weights is None
    torch.testing.assert_close(outputs, attention(x, x, x)[0], rtol=1e-4, atol=1e-6)


def test_assigned_gradients_step_an_optimiser():
    model = nn.Linear(3, 2)
    apply, params, buffers = jd.functionalize(model)
    x = torch.randn(4, 3)
    step = jd.grad(lambda p, x: apply(p, buffers, x)[0].square().mean(0), jd.upgrad())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads, _ = step(None, params, x)
    before = clone(params)
    jd.interop.assign_grads_(model, grads)
    optimizer.step()
    want = {name: before[name] - 0.1 * grads[name] for name in before}
    assert_trees_close(dict(model.named_parameters()), want, rtol=1e-6)
    assert_trees_close(params, want, rtol=1e-6)  # detached views of the same memory


def test_assigned_gradients_of_a_pytree():
    wide = torch.ones(2, dtype=torch.float64, requires_grad=True)
    params = {"a": wide, "b": [torch.ones(3, requires_grad=True)]}
    grads = {"a": torch.tensor([1.0, 2.0]), "b": [torch.full((3,), 4.0)]}
    jd.interop.assign_grads_(params, grads)
    assert params["a"].grad is not None
    assert params["a"].grad.dtype == torch.float64
    assert torch.equal(params["b"][0].grad, grads["b"][0])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_work_by_mapping_the_pullback(layer):
    apply, params, buffers = jd.functionalize(layer(3, 4, batch_first=True).double())
    x = torch.randn(2, 5, 3, dtype=torch.float64)

    def objective(params):
        return apply(params, buffers, x)[0][0].square().mean((0, 1))

    mapped = jd.gramian(objective)(params)
    torch.testing.assert_close(mapped, jd.gramian(objective, chunk_size=1)(params))


class LoRA(nn.Module):
    """A frozen layer with an update of rank 1."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.down = nn.Linear(3, 1, bias=False)
        self.up = nn.Linear(1, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.base(x) + self.up(self.down(x)))


def test_frozen_parameters_are_constants_with_the_buffers():
    model = LoRA().double()
    apply, params, buffers = jd.functionalize(model)
    assert sorted(params) == ["down.weight", "norm.bias", "norm.weight", "up.weight"]
    assert {"base.weight", "base.bias", "norm.running_mean"} <= set(buffers)
    x = torch.randn(5, 3, dtype=torch.float64)

    def objective(params, buffers, x):
        outputs, buffers = apply(params, buffers, x)
        return outputs.square().mean(0), buffers

    step = jd.grad_and_value(objective, jd.upgrad(), has_aux=True)
    grads, (_, after), _ = step(None, params, buffers, x)
    assert set(grads) == set(params)
    assert torch.equal(after["base.weight"], model.base.weight)
    assert after["norm.num_batches_tracked"] == 1
    step(None, params, after, x)
    rows = jd.gramian(objective, has_aux=True)(params, buffers, x)[0]
    copy = LoRA().double()
    copy.load_state_dict(model.state_dict())
    losses = copy(x).square().mean(0)
    trained = [leaf for leaf in copy.parameters() if leaf.requires_grad]
    by_loss = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
    matrix = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in by_loss])
    torch.testing.assert_close(rows, matrix @ matrix.mT)
    fast, counter = compiled(step)
    assert_trees_close(fast(None, params, buffers, x), step(None, params, buffers, x))
    assert counter.graphs == 1


def test_which_parameters_are_frozen_is_read_once():
    model = nn.Linear(3, 2)
    apply, params, buffers = jd.functionalize(model)
    model.requires_grad_(False)
    apply(params, buffers, torch.ones(1, 3))
    assert sorted(params) == ["bias", "weight"]


def test_parameters_unfrozen_later_are_warned_of():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    apply, params, buffers = jd.functionalize(model)
    x = torch.ones(1, 3)
    apply(params, buffers, x)
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'0\.weight' .* requires a gradient now.*again"):
        apply(params, buffers, x)
    own = {name: param + 0 for name, param in params.items()}
    del params
    apply(own, buffers, x)  # a pure loop trains what it holds


def test_a_tree_of_modules_gives_trees():
    trunk, head = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(),
        nn.Linear(4, 1).double(),
    )
    (apply, heads), params, buffers = jd.functionalize((trunk, {"a": head}))
    assert sorted(params[0]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert sorted(params[1]["a"]) == ["bias", "weight"]
    assert buffers[1] == {"a": {}}

    def of_trunk(shared, batch):
        x, buffers = batch
        return apply(shared, buffers[0], x)

    objective = jd.multitask(
        of_trunk,
        {"a": lambda p, z, batch: heads["a"](p, batch[1][1]["a"], z)[0].square().mean()},
        has_aux=True,
    )
    x = torch.randn(5, 3, dtype=torch.float64)
    grads, (losses, after), _ = jd.grad_and_value(objective, jd.sum(), has_aux=True)(
        None, params, (x, buffers)
    )
    loss = head(trunk(x)).square().mean()
    loss.backward()
    torch.testing.assert_close(losses["a"], loss.detach())
    assert_trees_close(grads[0], {name: p.grad for name, p in trunk.named_parameters()})
    assert_trees_close(grads[1]["a"], {name: p.grad for name, p in head.named_parameters()})
    assert after["1.num_batches_tracked"] == 1


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.double().float(),
        lambda model: model.load_state_dict(clone(model.state_dict()), assign=True),
        lambda model: nn.utils.vector_to_parameters(torch.zeros(8), model.parameters()),
    ],
    ids=["converted", "assigned", "written over"],
)
def test_parameters_that_left_their_module_are_warned_of(replace):
    model = nn.Linear(3, 2)
    apply, params, _ = jd.functionalize(model)
    step = jd.grad(lambda params, x: apply(params, {}, x)[0].square().mean(0), jd.mean())
    x = torch.randn(4, 3)
    step(None, params, x)
    replace(model)
    with pytest.warns(UserWarning, match="jd.functionalize again"):
        step(None, params, x)
    copy.deepcopy(apply)(params, {}, x)  # a copy lent nothing
    own = {name: param + 0 for name, param in params.items()}
    del params
    step(None, own, x)  # a pure loop has parameters of its own


def test_planning_with_other_parameters_warns_of_none_that_left():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    apply, params, _ = jd.functionalize(model)
    trained = {name: param + 1 for name, param in params.items()}
    objective = jd.instancewise(lambda params, x: apply(params, {}, x)[0].square().sum(1))
    with warnings.catch_warnings(record=True) as caught:  # an error would end that part of a proof
        warnings.simplefilter("always")
        jd.gramian(objective)(trained, torch.randn(4, 3))
    assert params and not caught  # which are constants of the objective now, and tried as such


def test_containers_of_modules_are_trees():
    inner = nn.Linear(2, 3)
    heads = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.ModuleList([inner])})
    apply, params, _ = jd.functionalize((nn.Linear(4, 2), heads))
    assert [tuple(sorted(part)) for part in (params[1]["a"], params[1]["b"][0])] == [
        ("bias", "weight")
    ] * 2
    torch.testing.assert_close(
        apply[1]["a"](params[1]["a"], {}, torch.ones(2))[0], heads["a"](torch.ones(2)).detach()
    )
    jd.interop.assign_grads_((nn.Linear(4, 2), heads), (None, params[1]))
    torch.testing.assert_close(inner.weight.grad, params[1]["b"][0]["weight"])
    jd.interop.assign_grads_(heads, {"a.weight": None})
    assert heads["a"].weight.grad is None
