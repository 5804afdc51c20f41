"""`backward_` through features, on part of the losses, and over processes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests import workers
from tests.helpers import assert_trees_close
from tests.interop.models import LR, X, descend, grads_of, tasks
from torchjd_func import _tree


def functional_tasks(model):
    """Return the objective of the same tasks, and its parameters."""
    trunk, shared, buffers = jd.functionalize(copy.deepcopy(model.trunk))
    pairs = {name: jd.functionalize(copy.deepcopy(head)) for name, head in model.heads.items()}
    heads = {
        name: lambda p, z, x, apply=apply, i=i: apply(p, {}, z)[0].sub(i).square().mean()
        for i, (name, (apply, _, _)) in enumerate(pairs.items())
    }
    objective = jd.multitask(lambda p, x: trunk(p, buffers, x)[0], heads)
    return objective, (shared, {name: params for name, (_, params, _) in pairs.items()})


def both(model):
    """Return the gradients of trunk and heads in the structure of `functional_tasks`."""
    return grads_of(model.trunk), {name: grads_of(head) for name, head in model.heads.items()}


WITH_FEATURES = {
    "upgrad": jd.upgrad,
    "mean": jd.mean,
    "gradvac": jd.gradvac,
    "trimmed_mean": lambda: jd.trimmed_mean(1),
    "moco": jd.moco,
    "grouped": lambda: jd.grouped(jd.mgda(), jd.by_network),
    "uniform scalarizer": jd.scalarizers.geometric_mean,
}


@pytest.mark.parametrize("chunk_size", [1, None])
@pytest.mark.parametrize("make", WITH_FEATURES.values(), ids=WITH_FEATURES)
def test_features_give_the_numbers_of_multitask(make, chunk_size):
    model, rule, key = tasks(), make(), jd.random.key(3)
    objective, params = functional_tasks(model)
    want, state = jd.init_state(rule, objective, params, X, key=key), None
    for _ in range(3):
        grads, want = jd.grad(objective, rule)(want, params, X)
        z, losses = model.losses(X)
        target = (model.trunk, dict(model.heads.items()))
        options = {"features": z, "key": key, "chunk_size": chunk_size}
        state = jd.interop.backward_(losses, target, rule, state, **options)
        assert_trees_close(both(model), grads, rtol=1e-12, atol=1e-12)
        assert_trees_close(state, want, rtol=1e-12, atol=1e-12)
        params = _tree.map(lambda p, g: p - LR * g, params, grads)
        descend(model.parameters())


def test_parameters_may_be_losses_and_features():
    w: Any = torch.tensor([3.0, 4.0], requires_grad=True)
    jd.interop.backward_(w, w, jd.sum())
    assert w.grad.tolist() == [1, 1]
    w = w.detach().requires_grad_()
    v: Any = torch.tensor(2.0, requires_grad=True)
    jd.interop.backward_([w.sum() * v, w.prod() * v], {"w": w, "v": v}, jd.sum(), features=w)
    assert w.grad.tolist() == [10, 8]
    assert v.grad.item() == 19


def test_heads_may_be_shared_and_features_many():
    torch.manual_seed(0)
    trunk, head = nn.Linear(4, 6).double(), nn.Linear(3, 1).double()
    left, right = trunk(X).chunk(2, dim=1)
    losses = [head(left).square().mean(), head(right).sub(1).square().mean()]
    want = torch.autograd.grad(losses[0] + losses[1], [head.weight], retain_graph=True)
    jd.interop.backward_(losses, [trunk, head], jd.mean(), features=[left, right])
    torch.testing.assert_close(head.weight.grad, want[0])
    left, right = trunk(X).chunk(2, dim=1)
    losses = [head(left).square().mean(), head(right).sub(1).square().mean()]
    want = torch.autograd.grad((losses[0] + losses[1]) / 2, [trunk.weight])
    torch.testing.assert_close(trunk.weight.grad, want[0])


TAKES_PRESENT = {
    "gramian": jd.upgrad(),
    "size": jd.mean(),
    "rows": jd.excess_mtl(),
    "scalarizer": jd.scalarizers.famo(),
}
every_way = pytest.mark.parametrize("rule", TAKES_PRESENT.values(), ids=TAKES_PRESENT)


@every_way
@pytest.mark.parametrize("with_features", [False, True])
def test_bools_leave_absent_heads_without_a_gradient(rule, with_features):
    model, twin = tasks(), tasks()
    z, losses = model.losses(X)
    losses["b"] = losses["b"] * torch.nan
    options = {"features": z} if with_features else {}
    present = {"a": True, "b": False, "c": True}
    jd.interop.backward_(losses, model, rule, present=present, **options)
    z, losses = twin.losses(X)
    two = {name: losses[name] for name in ("a", "c")}
    options = {"features": z} if with_features else {}
    jd.interop.backward_(two, twin, rule, **options)
    for (name, got), want in zip(grads_of(model).items(), grads_of(twin).values(), strict=True):
        assert (got is None) == name.startswith("heads.b")
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_way
def test_a_tensor_gives_absent_heads_zeros(rule):
    model = tasks()
    _, losses = model.losses(X)
    losses["b"] = losses["b"] * torch.nan
    jd.interop.backward_(losses, model, rule, present=torch.tensor([True, False, True]))
    assert all(param.grad.eq(0).all() for param in model.heads["b"].parameters())
    assert all(param.grad.isfinite().all() for param in model.parameters())
    assert model.trunk[0].weight.grad.norm() > 0


@every_way
def test_an_empty_batch_changes_nothing(rule):
    model = tasks()
    state = jd.interop.backward_(model.losses(X)[1], model, rule)
    model.zero_grad()
    losses = {name: loss.detach() * torch.nan for name, loss in model.losses(X)[1].items()}
    absent = dict.fromkeys(losses, False)
    after = jd.interop.backward_(losses, model, rule, state, present=absent)
    assert all(param.grad is None for param in model.parameters())
    assert_trees_close(after, state, rtol=0, atol=0)


def test_adamw_leaves_a_head_without_examples_where_it_is():
    model, rule = tasks(), TAKES_PRESENT["gramian"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for absent in ("", "b"):
        optimizer.zero_grad()
        before = copy.deepcopy(model)
        present = {name: name != absent for name in "abc"}
        jd.interop.backward_(model.losses(X)[1], model, rule, present=present)
        optimizer.step()
    moved = {n: not torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters()}
    assert moved == {name: not name.startswith("heads.b") for name in moved}


def parts_of_a_batch(rank_of, world):
    """Return the parameters after steps on a part of the batch."""
    model = tasks()
    target = (model.trunk, dict(model.heads.items()))
    state = None
    for _ in range(2):
        z, losses = model.losses(X[:6].chunk(world)[rank_of])
        rule = jd.smoothed(jd.upgrad())
        rule = rule if world == 1 else jd.distributed.data_parallel(rule)
        state = jd.interop.backward_(losses, target, rule, state, features=z)
        descend(model.parameters())
    return _tree.map(torch.Tensor.detach, dict(model.named_parameters()))


def parts_here():
    """Take those steps as one of two processes."""
    import torch.distributed as dist

    return parts_of_a_batch(dist.get_rank(), dist.get_world_size())


def absent_here():
    """Take a step in which the last process has no loss of one head."""
    import torch.distributed as dist

    model, rank = tasks(), dist.get_rank()
    z, losses = model.losses(X[:6].chunk(2)[rank])
    target, present = (model.trunk, dict(model.heads.items())), dict.fromkeys(losses, True)
    present["b"] = rank == 0
    rule = jd.distributed.data_parallel(jd.upgrad())
    jd.interop.backward_(losses, target, rule, features=z, present=present)
    return {name: param.grad for name, param in model.named_parameters()}


def test_a_head_is_averaged_over_the_processes_that_have_it():
    parts = []
    for x in X[:6].chunk(2):
        model = tasks()
        torch.stack(list(model.losses(x)[1].values())).sum().backward()
        parts.append({name: param.grad for name, param in model.named_parameters()})
    for found in workers.run(2, absent_here):
        for name, grad in found.items():
            if name.startswith("heads"):
                want = parts[0][name] if ".b." in name else (parts[0][name] + parts[1][name]) / 2
                torch.testing.assert_close(grad, want)


def test_a_rule_over_processes_averages_gradients_and_heads():
    want = parts_of_a_batch(0, 1)
    for found in workers.run(2, parts_here):
        assert_trees_close(found, want, rtol=1e-10)
