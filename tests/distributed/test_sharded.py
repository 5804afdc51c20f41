"""Sharded parameters, FSDP2's among them, equal one process with the whole batch."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import torchjd_func as jd
from tests import workers
from tests.distributed.test_data_parallel import (
    assert_ranks_agree,
    data,
    methods,
    objective,
    parameters,
    part,
    short,
)
from tests.distributed.test_gathered import said
from tests.helpers import assert_trees_close
from tests.short import COLUMNS, ROWS, SHORT, SIZE
from torchjd_func import _tree

# By their Gramian, without it, by Gramians of groups, by columns, and by rows.
SOME = ("upgrad", "gradvac", "mean", "rlw", "groups", "trimmed_mean", "graddrop", "moco", "db_mtl")
FEW = {  # one of each kind, quick to trace
    "short": SHORT,
    "short size": SIZE,
    "short groups": jd.grouped(SHORT, jd.by_tensor),
    "short columns": COLUMNS,
    "short rows": ROWS,
}


@functools.cache
def mesh_of(shape):
    """Return a mesh of this shape over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def placed(params, layout):
    """Return sharded parameters: by rows, by columns, with replicas, or some not at all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = mesh_of((2, world // 2) if layout == "replicas" else (world,))

    def place(leaf):
        if leaf.ndim == 0:
            return leaf if layout == "columns" else distribute_tensor(leaf, mesh)
        last = Shard(leaf.ndim - 1) if layout == "columns" else Shard(0)
        return distribute_tensor(leaf, mesh, [*[Replicate()] * (mesh.ndim - 1), last])

    return _tree.map(place, params)


def whole(tree):
    """Return plain tensors."""
    return _tree.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, tree)


def with_backend(fn, backend):
    """Return a function, compiled if there is a backend."""
    torch._dynamo.reset()
    return fn if backend is None else torch.compile(fn, backend=backend, fullgraph=True)


def train(fn, rule, key, params, batch, backend=None, steps=3):
    """Return gradients of a first step, parameters after some of Adam, losses and state."""
    state = jd.init_state(rule, fn, params, batch, key=key)
    step, first, losses = with_backend(jd.grad_and_value(fn, rule), backend), None, None
    moments = [_tree.map(torch.zeros_like, params)] * 2
    for count in range(1, steps + 1):
        grads, losses, state = step(state, params, batch)
        first = grads if first is None else first
        moments = [
            _tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads),
            _tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, moments[1], grads),
        ]
        move = functools.partial(adam, count=count)
        params = _tree.map(move, params, *moments)
    return first, params, losses, state


def adam(param, mean, square, *, count):
    """Take one step."""
    return param - 0.01 * mean / (1 - 0.9**count) / ((square / (1 - 0.99**count)).sqrt() + 1e-8)


def every():
    """Return the objective, the rule and the key of each method."""
    return methods() | {name: (short, rule, None) for name, rule in FEW.items()}


def by_methods(layout, names, backend, steps):
    """Train by some methods on the part of this rank, with sharded parameters."""
    found, cases = {}, every()
    for name in names:
        fn, rule, key = cases[name]
        params = placed(parameters(), layout)
        grads, after, losses, state = train(
            jd.distributed.sharded(fn), rule, key, params, part(data()), backend, steps
        )
        for got, want in zip(_tree.leaves(grads), _tree.leaves(params), strict=True):
            assert type(got) is type(want), name
            assert getattr(got, "placements", None) == getattr(want, "placements", None), name
        found[name] = whole(grads), whole(after), losses, state
    return found


@functools.cache
def alone(name, steps):
    """Train by a method in this process."""
    fn, rule, key = every()[name]
    return train(fn, rule, key, parameters(), data(), steps=steps)


@pytest.mark.parametrize(
    ("world", "layout", "names", "backend", "steps"),
    [
        (2, "columns", tuple(methods()), None, 3),
        (2, "rows", SOME, None, 3),
        (4, "replicas", SOME, None, 10),
        (2, "rows", tuple(FEW), "aot_eager", 3),
    ],
)
def test_every_method_equals_one_process(world, layout, names, backend, steps):
    first, *others = workers.run(world, by_methods, layout, names, backend, steps)
    assert_ranks_agree(first, others, {name: alone(name, steps) for name in names})


def few_transforms(fn, params, batch):
    """Return what some transforms make of an objective."""
    losses, gramian, vjp_fn = jd.gramian_vjp(fn, params, batch)
    return {
        "losses": losses,
        "gramian": gramian,
        "pulled": vjp_fn(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)),
        "jac": jd.jac(fn)(params, batch),
    }


def transforms(fn, params, batch):
    """Return what all transforms make of an objective."""
    double = jd.double_sampling(fn, jd.sdmgrad())
    return {
        **few_transforms(fn, params, batch),
        "one by one": jd.gramian(fn, route="jacobian", chunk_size=1)(params, batch),
        "cross": jd.cross_gramian(fn)(params, (batch,), (batch.flip(1),)),
        "two": double(None, params, (batch,), (batch.flip(1),))[:2],
        "state": jd.init_state(jd.moco(), fn, params, batch),
    }


def transforms_here(layout, backend):
    """Run on this rank."""
    fn, some = jd.distributed.sharded(objective(3)), few_transforms if backend else transforms
    run = with_backend(some, backend)
    return whole(run(fn, placed(parameters(), layout), part(data())))


@pytest.mark.parametrize(
    ("world", "layout", "backend"),
    [(2, "rows", None), (4, "replicas", None), (2, "rows", "aot_eager")],
)
def test_every_transform_equals_one_process(world, layout, backend):
    want = (few_transforms if backend else transforms)(objective(3), parameters(), data())
    for found in workers.run(world, transforms_here, layout, backend):
        assert_trees_close(found, want, rtol=1e-10, atol=1e-10)


def options(fn, params, batch):
    """Return what options, combinators and scalarizers make of an objective."""
    some: Any = {"where": lambda path: path.startswith("trunk")}
    mask = torch.tensor([True, False, True])
    scaled = jd.loss_scale.scaled(fn, jd.loss_scale.init(2.0**10))
    jac = jd.jac(fn, **some)(params, batch)
    assert jac.pop("gain") is None
    return {
        "where": jd.grad(fn, jd.mgda(), **some)(None, params, batch),
        "gramian": jd.gramian(fn, **some)(params, batch),
        "jac": jac,
        "scalarizer": jd.grad(fn, jd.scalarizers.uw())(None, params, batch),
        "accumulate": jd.grad(jd.accumulate(fn, 2), jd.upgrad())(None, params, batch),
        "scaled": jd.grad(scaled, jd.upgrad())(None, params, batch),
        "present": jd.grad(fn, jd.mgda())(None, params, batch, present=mask),
        "keyword": jd.grad(fn, jd.mgda())(None, params, x=batch),
        "norms": jd.row_norms(fn)(params, batch),
        "clipped": jd.grad(fn, jd.clipped_mean(1.0))(None, params, batch),
    }


def options_here():
    """Run on this rank."""
    fn = jd.distributed.sharded(objective(3))
    return whole(options(fn, placed(parameters(), "rows"), part(data())))


def test_options_equal_one_process():
    want = options(objective(3), parameters(), data())
    for found in workers.run(2, options_here):
        assert_trees_close(found, want, rtol=1e-9, atol=1e-10)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (8, 6)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        (8, 2, 4, 4),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 5, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
        (8, 3, 6),
    ),
}


def network(name):
    """Return a network, a batch, and the objective of a module."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double()

    def losses(params, x):
        return functional_call(net, params, (x,)).square().mean(0)

    return net, losses, torch.randn(shape, dtype=torch.float64)


def fully_sharded(names, backend):
    """Step with the parameters of modules after `fully_shard`, through PyTorch's optimizer."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name in names:
        net, losses, x = network(name)
        model = copy.deepcopy(net)
        for layer in model:
            fully_shard(layer, mesh=mesh_of((dist.get_world_size(),)))
        params = dict(model.named_parameters())
        fn = jd.distributed.sharded(losses)
        step = with_backend(jd.grad_and_value(fn, SHORT, chunk_size=1), backend)
        grads, values, _ = step(None, params, part(x))
        jd.interop.assign_grads_(model, grads)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        after = {key: value.detach() for key, value in model.named_parameters()}
        found[name] = whole(grads), values, whole(after)
    return found


@pytest.mark.parametrize(("names", "backend"), [(tuple(NETS), None), (("mlp",), "aot_eager")])
def test_modules_of_fsdp_equal_plain_ones(names, backend):
    (first, other) = workers.run(2, fully_sharded, names, backend)
    assert_trees_close(first, other, rtol=0, atol=0)
    for name in names:
        net, losses, x = network(name)
        params = {key: value.detach() for key, value in net.named_parameters()}
        grads, values, _ = jd.grad_and_value(losses, SHORT, chunk_size=1)(None, params, x)
        after = {key: params[key] - 0.1 * grads[key] for key in params}
        assert_trees_close(first[name], (grads, values, after), rtol=1e-10, atol=1e-10)


def mistakes():
    """Return what is said of mistakes."""
    from torch.distributed.tensor import DTensor, Partial

    mesh, fn = mesh_of((2,)), objective(3)
    wrapped, params, x = jd.distributed.sharded(fn), placed(parameters(), "rows"), data()
    partial = DTensor.from_local(torch.ones(6), mesh, [Partial()], run_check=False)
    tries = {
        "plain": lambda: jd.jac(wrapped)(parameters(), x),
        "partial": lambda: jd.jac(jd.distributed.sharded(torch.square))(partial),
        "layerwise": lambda: jd.gramian(wrapped, route="layerwise")(params, x),
        "product": lambda: jd.gramian(wrapped, route="product")(params, x),
        "tasks": lambda: jd.distributed.sharded(jd.multitask(fn, {"a": fn})),
        "twice": lambda: jd.distributed.sharded(wrapped),
        "rule": lambda: jd.grad(wrapped, jd.distributed.data_parallel(jd.mean()))(None, params, x),
    }
    return {name: said(fn) for name, fn in (tries | of_fsdp()).items()}


def of_fsdp():
    """Return mistakes with a module after `fully_shard`."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    net, losses, x = network("mlp")
    model = fully_shard(copy.deepcopy(net), mesh=mesh_of((2,)))
    params = dict(model.named_parameters())
    inside = jd.distributed.sharded(lambda p, x: functional_call(model, p, (x,)).square().mean(0))
    called = jd.distributed.sharded(lambda p, x: model(x).square().mean(0))
    return {
        "functionalize": lambda: jd.functionalize(model),
        "wrapped": lambda: jd.functionalize(DistributedDataParallel(net)),
        "one process": lambda: jd.grad(losses, jd.upgrad())(None, params, x),
        "inside": lambda: jd.grad(inside, jd.upgrad())(None, params, x),
        "state": lambda: jd.init_state(jd.upgrad(), inside, params, x),
        "called": lambda: jd.grad(called, jd.upgrad())(None, params, x),
    }


def outside():
    """Differentiate by parameters on a mesh of the first process."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh("cpu", [0])
    w = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    jd.grad(jd.distributed.sharded(lambda w: (w.sum(), w[0])), jd.upgrad())(None, w)


def test_a_process_outside_the_mesh():
    inside, failure = workers.outcomes(2, outside)
    assert inside is None
    assert failure.message.startswith("this process must be in `group`, got another group's")


def test_mistakes_are_named():
    (found, other) = workers.run(2, mistakes)
    assert found == other
    assert "must be DTensors on one mesh, got 0 meshes" in found["plain"]
    assert "must be Shard or Replicate, got (Partial(sum),)" in found["partial"]
    for name in ("layerwise", "product"):
        assert found[name].startswith("ValueError: `route` must be 'auto' or 'jacobian'")
    for name in ("tasks", "twice"):
        assert "must be a plain function" in found[name], name
    assert "must be that of one process, got one of jd.distributed" in found["rule"]
    assert "jd.distributed.data_parallel" in found["wrapped"]
    for name in ("functionalize", "one process", "inside", "state", "called"):
        assert found[name].startswith("ValueError: "), found[name]
        assert "jd.distributed.sharded" in found[name], name
        assert "copy of the module that fully_shard has not touched" in found[name], name
