"""Each script of the object-oriented peer's documentation, written four ways, side by side.

The script as it stands; with a rule of ours as its aggregator; as a loop of plain autograd with
`backward_`; and as a function, whose whole step is one graph (here of some methods; what compiles
is tested with methods and transforms). All start from the same parameters in float64 and take the
same batches. Ours agree to 1e-9, and with the peer where it is exact; with its default
regularisation, to 1e-3. Two batches for one step (`jd.double_sampling`) are no loop of `backward_`,
which has one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
import torchjd.aggregation as peer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac, jac_to_grad, mtl_backward
from torchjd.linalg import QuadprogProjector

import torchjd_func as jd
from tests.helpers import assert_trees_close, compiled
from torchjd_func import _tree

LR = 0.1
N_STEPS = 8


@dataclass(frozen=True)
class Theirs:
    """A method of the peer, and how far it may be from ours."""

    aggregator: Callable[[], Any]
    weighting: Callable[[], Any]
    tol: float


@dataclass(frozen=True)
class Pair:
    """One method in both libraries, in the peer's with one or several sets of options."""

    ours: Callable[[], jd.Aggregator]
    theirs: tuple[Theirs, ...]
    graph: bool = False  # whether our step is compiled


def projector() -> Any:
    """Return the peer's solver with almost none of its regularisation."""
    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)


EXACT = Theirs(
    lambda: peer.UPGrad(projector=projector()),
    lambda: peer.UPGradWeighting(projector=projector()),
    1e-9,
)
UPGRAD = Pair(jd.upgrad, (Theirs(peer.UPGrad, peer.UPGradWeighting, 1e-3), EXACT), graph=True)
PAIRS = {
    "upgrad": UPGRAD,
    "aligned_mtl": Pair(jd.aligned_mtl, (Theirs(peer.AlignedMTL, peer.AlignedMTLWeighting, 1e-9),)),
    "mean": Pair(jd.mean, (Theirs(peer.Mean, peer.MeanWeighting, 1e-9),)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@pytest.fixture(autouse=True)
def double():
    """Make modules and data in float64, the same for each test."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def final(modules: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of modules."""
    return {name: dict(module.named_parameters()) for name, module in modules.items()}


def descend(params: Any, grads: Any) -> Any:
    """Take a step of plain gradient descent."""
    return _tree.map(lambda p, g: p - LR * g, params, grads)


def train(
    step: Callable[..., Any], params: Any, state: Any, batches: Any, *, graph: bool = True
) -> Any:
    """Run our step over all batches, as one graph if so asked; return the final parameters."""
    fast, counter = compiled(step) if graph else (step, None)
    for batch in zip(*batches, strict=True):
        params, state = fast(params, state, *batch)
    assert counter is None or counter.graphs == 1
    return params


def same(ours: Any, theirs: Any, tol: float) -> None:
    """Compare final parameters relative to their size."""
    a, b = _tree.ravel(ours), _tree.ravel(theirs).detach()
    assert (a - b).norm() <= tol * b.norm(), float((a - b).norm() / b.norm())


def fit(modules: Mapping[str, nn.Module], batches: Any, update: Callable[..., Any]) -> Any:
    """Train copies of modules by a loop of torch; return their parameters."""
    copies = dict(copy.deepcopy(modules))
    optimizer = SGD(all_parameters(copies), lr=LR)
    for batch in zip(*batches, strict=True):
        update(copies, *batch)
        optimizer.step()
        optimizer.zero_grad()
    return final(copies)


def stateful(rule: jd.Aggregator, key: Any = None) -> Any:
    """Return `backward_` with the state of a rule in it."""
    memory: list[Any] = [None]

    def call(losses: Any, target: Any, **options: Any) -> None:
        memory[0] = jd.interop.backward_(losses, target, rule, memory[0], key=key, **options)

    call.memory = memory  # type: ignore[attr-defined]
    return call


def aggregators(pair: Pair) -> list[tuple[Any, Any, float]]:
    """Return aggregator and weighting of the peer, of ours as the peer's, and tolerances."""
    ours = jd.interop.torchjd_aggregator(pair.ours())
    theirs = [(each.aggregator(), each.weighting(), each.tol) for each in pair.theirs]
    return [*theirs, (ours, ours.gramian_weighting, 1e-9)]


def single(model: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Return a module without buffers as a function, and copies of its parameters."""
    apply, params, buffers = jd.functionalize(model)
    copies = {name: leaf.clone() for name, leaf in params.items()}
    return lambda params, x: apply(params, buffers, x)[0], copies


def stepper(objective: Any, rule: jd.Aggregator, **options: Any) -> Callable[..., Any]:
    """Return one step of our library."""

    def step(params, state, *batch):
        grads, state = jd.grad(objective, rule, **options)(state, params, *batch)
        return descend(params, grads), state

    return step


@every_pair
def test_basic_usage(pair):
    model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2))
    x, y1, y2 = torch.randn(N_STEPS, 16, 10), torch.randn(N_STEPS, 16), torch.randn(N_STEPS, 16)
    forward, params = single(model)

    def objective(params, x, y1, y2):
        out = forward(params, x)
        return mse_loss(out[:, 0], y1), mse_loss(out[:, 1], y2)

    rule = pair.ours()
    state = jd.init_state(rule, objective, params, x[0], y1[0], y2[0])
    ours = train(stepper(objective, rule), params, state, (x, y1, y2), graph=pair.graph)

    def losses(modules, x, y1, y2):
        out = modules["model"](x)
        return [mse_loss(out[:, 0], y1), mse_loss(out[:, 1], y2)]

    modules, backward_ = {"model": model}, stateful(rule)
    for aggregator, _, tol in aggregators(pair):

        def theirs(modules, *batch, aggregator=aggregator):
            backward(losses(modules, *batch))
            jac_to_grad(modules["model"].parameters(), aggregator)

        same({"model": ours}, fit(modules, (x, y1, y2), theirs), tol)

    def loop(modules, *batch):
        backward_(losses(modules, *batch), modules["model"])

    same({"model": ours}, fit(modules, (x, y1, y2), loop), 1e-9)


def regression() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return the model and the data of the instance-wise scripts.

    Batches of 4 and tanh, where the scripts have 16 and ReLU: the Gramian is then regular, so that
    the weights are unique; where it is singular, the peer's are those of its regularisation.
    """
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, torch.randn(N_STEPS, 4, 10), torch.randn(N_STEPS, 4)


def squares(modules: dict[str, nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """Return one loss for each example."""
    return (modules["model"](x)[:, 0] - y).square()


@pytest.mark.parametrize(("engine", "route"), [("autojac", "jacobian"), ("autogram", "product")])
def test_instance_wise_risk_minimisation(engine, route):
    model, x, y = regression()
    forward, params = single(model)
    objective = jd.instancewise(lambda params, x, y: (forward(params, x)[:, 0] - y).square())
    step = stepper(objective, jd.upgrad(), route=route)
    ours = train(step, params, (), (x, y), graph=route == "product")

    for aggregator, weigh, tol in aggregators(UPGRAD):
        gramians: list[Engine] = []

        def theirs(modules, x, y, aggregator=aggregator, weigh=weigh, gramians=gramians):
            if engine == "autojac":
                backward(squares(modules, x, y))
                return jac_to_grad(modules["model"].parameters(), aggregator)
            if not gramians:
                gramians.append(Engine(modules["model"], batch_dim=0))
            losses = squares(modules, x, y)
            return losses.backward(weigh(gramians[0].compute_gramian(losses)))

        same({"model": ours}, fit({"model": model}, (x, y), theirs), tol)
    backward_ = stateful(jd.upgrad())

    def loop(modules, x, y):
        backward_(squares(modules, x, y), modules["model"])

    same({"model": ours}, fit({"model": model}, (x, y), loop), 1e-9)


def test_partial_jacobian_descent():
    model, x, y = regression()
    forward, params = single(model)
    objective = jd.instancewise(lambda params, x, y: (forward(params, x)[:, 0] - y).square())
    step = stepper(objective, jd.upgrad(), where=lambda path: not path.startswith("0."))
    ours = train(step, params, (), (x, y), graph=False)

    for _, weigh, tol in aggregators(UPGRAD):
        engines: list[Engine] = []

        def theirs(modules, x, y, weigh=weigh, engines=engines):
            if not engines:
                engines.append(Engine(modules["model"][2:], batch_dim=0))
            losses = squares(modules, x, y)
            losses.backward(weigh(engines[0].compute_gramian(losses)))

        same({"model": ours}, fit({"model": model}, (x, y), theirs), tol)
    backward_ = stateful(jd.upgrad())

    def loop(modules, x, y):
        losses = squares(modules, x, y)
        backward_(losses, modules["model"], where=lambda path: not path.startswith("0."))

    same({"model": ours}, fit({"model": model}, (x, y), loop), 1e-9)


def two_tasks(b: int = 16, kind: Any = nn.ReLU) -> tuple[dict[str, nn.Module], tuple[Tensor, ...]]:
    """Return the modules and the data of the multi-task scripts."""
    modules = {
        "trunk": nn.Sequential(nn.Linear(10, 5), kind(), nn.Linear(5, 3), kind()),
        "one": nn.Linear(3, 1),
        "two": nn.Linear(3, 1),
    }
    return modules, tuple(torch.randn(N_STEPS, b, n) for n in (10, 1, 1))


def as_multitask(modules: dict[str, nn.Module]) -> tuple[Any, Any]:
    """Return the multi-task objective of the modules, and its parameters."""
    trunk, shared = single(modules["trunk"])
    forwards = {name: single(modules[name]) for name in ("one", "two")}
    heads = {
        name: lambda params, z, batch, forward=forward, place=place: mse_loss(
            forward(params, z), batch[place]
        )
        for place, (name, (forward, _)) in enumerate(forwards.items(), start=1)
    }
    objective = jd.multitask(lambda params, batch: trunk(params, batch[0]), heads)
    return objective, (shared, {name: params for name, (_, params) in forwards.items()})


def by_parts(params: Any) -> dict[str, Any]:
    """Return the parameters of `as_multitask` by module."""
    shared, heads = params
    return {"trunk": shared, **heads}


def their_losses(modules: dict[str, nn.Module], x: Tensor, y1: Tensor, y2: Tensor) -> Any:
    """Return features and both losses."""
    z = modules["trunk"](x)
    return z, [mse_loss(modules["one"](z), y1), mse_loss(modules["two"](z), y2)]


def all_parameters(modules: dict[str, nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of all modules."""
    return [param for module in modules.values() for param in module.parameters()]


@every_pair
def test_multi_task_learning(pair):
    modules, data = two_tasks()
    objective, params = as_multitask(modules)
    step = stepper(objective, pair.ours())
    ours = train(lambda p, s, *batch: step(p, s, batch), params, (), data, graph=pair.graph)

    for aggregator, _, tol in aggregators(pair):

        def theirs(modules, *batch, aggregator=aggregator):
            z, losses = their_losses(modules, *batch)
            mtl_backward(losses, features=z)
            jac_to_grad(modules["trunk"].parameters(), aggregator)

        same(by_parts(ours), fit(modules, data, theirs), tol)
    same(by_parts(ours), fit(modules, data, task_loop(pair.ours())), 1e-9)


def task_loop(rule: jd.Aggregator, key: Any = None) -> Any:
    """Return an update of several tasks by `backward_`."""
    backward_ = stateful(rule, key)

    def update(modules, *batch):
        z, losses = their_losses(modules, *batch)
        target = (modules["trunk"], [modules["one"], modules["two"]])
        backward_(losses, target, features=z)

    update.memory = backward_.memory  # type: ignore[attr-defined]
    return update


def test_instance_wise_multi_task_learning():
    modules, data = two_tasks(2, nn.Tanh)
    pairs = {name: single(module) for name, module in modules.items()}
    params = {name: leaves for name, (_, leaves) in pairs.items()}
    forwards = {name: forward for name, (forward, _) in pairs.items()}

    def objective(params, x, y1, y2):  # one loss for each example and task, (b, 2)
        z = forwards["trunk"](params["trunk"], x)
        outs = [forwards[name](params[name], z) for name in ("one", "two")]
        return torch.cat([(outs[0] - y1).square(), (outs[1] - y2).square()], 1)

    step = stepper(objective, jd.upgrad(), where=lambda path: path.startswith("trunk"))
    ours = train(step, params, (), data)

    def losses(modules, x, y1, y2):
        z = modules["trunk"](x)
        outs = modules["one"](z), modules["two"](z)
        return torch.cat([(outs[0] - y1).square(), (outs[1] - y2).square()], 1)

    for _, weigh, tol in aggregators(UPGRAD):
        engines: list[Engine] = []

        def theirs(modules, *batch, weigh=weigh, engines=engines):
            if not engines:
                engines.append(Engine(modules["trunk"], batch_dim=0))
            both = losses(modules, *batch)
            both.backward(weigh(engines[0].compute_gramian(both)).reshape(both.shape))

        same(ours, fit(modules, data, theirs), tol)
    backward_ = stateful(jd.upgrad())

    def loop(modules, *batch):
        both = losses(modules, *batch)
        backward_(both, modules, where=lambda path: path.startswith("trunk"))

    same(ours, fit(modules, data, loop), 1e-9)


def test_recurrent_network_with_one_loss_for_each_step():
    rnn = nn.RNN(input_size=10, hidden_size=20, num_layers=2)
    x, y = torch.randn(N_STEPS, 5, 3, 10), torch.randn(N_STEPS, 5, 3, 20)
    forward, params = single(rnn)

    def cells(params, x):  # what torch.compile can capture
        steps = list(x.unbind())
        for layer in ("l0", "l1"):
            h = x.new_zeros(3, 20)
            for t, a in enumerate(steps):
                mixed = a @ params[f"weight_ih_{layer}"].T + params[f"bias_ih_{layer}"]
                h = (mixed + h @ params[f"weight_hh_{layer}"].T + params[f"bias_hh_{layer}"]).tanh()
                steps[t] = h
        return torch.stack(steps)

    def objective(params, x, y):
        return (cells(params, x) - y).square().mean((1, 2))

    def module_objective(params, x, y):
        return (forward(params, x)[0] - y).square().mean((1, 2))

    ours = train(stepper(objective, jd.upgrad()), params, (), (x, y))
    eager, state = params, ()
    for batch in zip(x, y, strict=True):
        eager, state = stepper(module_objective, jd.upgrad())(eager, state, *batch)
    same(eager, ours, 1e-9)

    for aggregator, _, tol in aggregators(UPGRAD):

        def theirs(modules, x, y, aggregator=aggregator):
            losses = (modules["rnn"](x)[0] - y).square().mean(dim=(1, 2))
            backward(losses, parallel_chunk_size=1)
            jac_to_grad(modules["rnn"].parameters(), aggregator)

        same({"rnn": ours}, fit({"rnn": rnn}, (x, y), theirs), tol)
    backward_ = stateful(jd.upgrad())

    def loop(modules, x, y):
        backward_((modules["rnn"](x)[0] - y).square().mean(dim=(1, 2)), modules["rnn"])

    same({"rnn": ours}, fit({"rnn": rnn}, (x, y), loop), 1e-9)


TWO_BATCH = {
    "modo": (lambda: jd.modo(gamma=0.1, rho=0.0), lambda: peer.MoDoWeighting(gamma=0.1, rho=0.0)),
    "sdmgrad": (lambda: jd.sdmgrad(solver="reference"), peer.SDMGradWeighting),
}


@pytest.mark.parametrize("name", TWO_BATCH)
@pytest.mark.parametrize(("n_batches", "route"), [(2, "jacobian"), (3, "product")])
def test_double_sampling(name, n_batches, route):
    ours, theirs = TWO_BATCH[name]
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    x, y = torch.randn(4, n_batches, 16, 5), torch.randn(4, n_batches, 16)
    forward, params = single(model)
    objective = jd.instancewise(lambda params, x, y: (forward(params, x)[:, 0] - y).square())
    rule = ours()

    def step(params, state, x, y):
        sample = jd.double_sampling(objective, rule, route=route)
        grads, _, state = sample(state, params, *zip(x, y, strict=True))
        return descend(params, grads), state

    state = jd.init_state(rule, objective, params, x[0, 0], y[0, 0])
    graph = (name, n_batches) == ("modo", 3)
    ended = train(step, params, state, (x, y), graph=graph)

    adapted = jd.interop.torchjd_aggregator(ours()).gramian_weighting
    for weigh in (theirs(), adapted):

        def two_batches(modules, x, y, weigh=weigh):
            leaves = list(modules["model"].parameters())
            losses = [squares(modules, *batch) for batch in zip(x, y, strict=True)]
            rows = [jac(part, leaves, retain_graph=True) for part in losses[:2]]
            first, second = (torch.cat([leaf.flatten(1) for leaf in row], 1) for row in rows)
            weights = weigh(first @ second.T)
            ((losses[0] + losses[1]) / 2 if n_batches == 2 else losses[2]).backward(weights)

        same({"model": ended}, fit({"model": model}, (x, y), two_batches), 1e-9)


def test_mixed_precision_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    modules, data = two_tasks()
    objective, params = as_multitask(modules)
    step = stepper(jd.cast_floating(objective, torch.bfloat16), jd.upgrad())
    ours = train(lambda p, s, *batch: step(p, s, batch), params, (), data, graph=False)

    backward_ = stateful(jd.upgrad())
    ways = {
        "peer": (peer.UPGrad(), 1e-2),
        "rule": (jd.interop.torchjd_aggregator(jd.upgrad()), 1e-2),
        "loop": (None, 1e-2),
    }
    for aggregator, tol in ways.values():

        def update(modules, *batch, aggregator=aggregator):
            with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
                z, losses = their_losses(modules, *batch)
            if aggregator is None:
                backward_(losses, modules, features=z)
            else:
                mtl_backward(losses, features=z)
                jac_to_grad(modules["trunk"].parameters(), aggregator)

        same(by_parts(ours), fit(modules, data, update), tol)


def test_mixed_precision_in_float16_with_a_loss_scale():
    torch.set_default_dtype(torch.float32)
    modules, data = two_tasks()
    objective, params = as_multitask(modules)
    half, rule = jd.cast_floating(objective, torch.float16), jd.upgrad()

    def step(params, scale, *batch):
        grads, _ = jd.grad(jd.loss_scale.scaled(half, scale), rule)((), params, batch)
        scale = jd.loss_scale.update(scale, grads)
        return jd.loss_scale.keep(scale, descend(params, grads), params), scale

    ours = train(step, params, jd.loss_scale.init(2.0**12), data, graph=False)

    aggregators = [peer.UPGrad(), jd.interop.torchjd_aggregator(jd.upgrad()), None]
    for aggregator in aggregators:
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**12)
        copies = copy.deepcopy(modules)
        optimizer = SGD(all_parameters(copies), lr=LR)
        for batch in zip(*data, strict=True):
            with torch.autocast(device_type="cpu", dtype=torch.float16):
                z, losses = their_losses(copies, *batch)
            if aggregator is None:
                jd.interop.backward_(losses, copies, jd.upgrad(), features=z, scaler=scaler)
            else:
                mtl_backward(scaler.scale(losses), features=z)
                jac_to_grad(copies["trunk"].parameters(), aggregator)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        same(by_parts(ours), final(copies), 2e-3)


def test_monitoring():
    """The script hooks into modules; here the numbers are values in the state."""
    modules, data = two_tasks()
    objective, params = as_multitask(modules)
    measures = {"weights": jd.measures.weights, "cosine": jd.measures.cosine_to_mean}
    rule = jd.monitored(jd.upgrad(), measures)
    step = stepper(objective, rule)
    fast, counter = compiled(lambda p, s, *batch: step(p, s, batch))
    state = jd.init_state(rule, objective, params, tuple(part[0] for part in data))
    seen = []
    for batch in zip(*data, strict=True):
        params, state = fast(params, state, *batch)
        latest = jd.read_measures(state)
        seen.append(torch.cat([latest["weights"], latest["cosine"].reshape(1)]))
    assert counter.graphs == 1

    aggregator, theirs = EXACT.aggregator(), []
    aggregator.gramian_weighting.register_forward_hook(
        lambda module, inputs, weights: theirs.append([*weights])
    )
    aggregator.register_forward_hook(
        lambda module, inputs, out: theirs[-1].append(
            cosine_similarity(out, inputs[0].mean(0), dim=0)
        )
    )
    adapted = jd.interop.torchjd_aggregator(rule)
    for each in (aggregator, adapted):

        def update(modules, *batch, aggregator=each):
            z, losses = their_losses(modules, *batch)
            mtl_backward(losses, features=z)
            jac_to_grad(modules["trunk"].parameters(), aggregator)

        same(by_parts(params), fit(modules, data, update), 1e-9)
    torch.testing.assert_close(torch.stack(seen), torch.tensor(theirs), rtol=0, atol=1e-7)
    loop = task_loop(rule)
    same(by_parts(params), fit(modules, data, loop), 1e-9)
    for last in (adapted.state, loop.memory[0]):
        latest = jd.read_measures(last)
        found = torch.cat([latest["weights"], latest["cosine"].reshape(1)])
        torch.testing.assert_close(found, seen[-1], rtol=0, atol=1e-9)


GROUPINGS = {
    "together": (jd.together, lambda trunk: [trunk]),
    "per network": (jd.by_network, lambda trunk: list(trunk)),
    "per layer": (jd.by_layer, lambda trunk: [m for m in trunk.modules() if type(m) is nn.Linear]),
    "per tensor": (jd.by_tensor, lambda trunk: [nn.ParameterList([p]) for p in trunk.parameters()]),
}


GROUPED = {  # the peer's default eps=1e-8 is no small part of the length of a bias's gradient
    "gradvac": (jd.gradvac, lambda: peer.GradVac(eps=1e-20)),
    "aligned_mtl": (jd.aligned_mtl, peer.AlignedMTL),
}


@pytest.mark.parametrize(("labels", "parts"), GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize(("ours", "theirs"), GROUPED.values(), ids=GROUPED)
def test_grouping_with_one_state_for_each_group(labels, parts, ours, theirs):
    encoder = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    modules, data = two_tasks()
    modules["trunk"] = nn.Sequential(encoder, nn.Sequential(nn.Linear(5, 3), nn.ReLU()))
    objective, params = as_multitask(modules)
    rule = jd.grouped(ours(), labels)
    first = tuple(part[0] for part in data)
    state = jd.init_state(rule, objective, params, first, key=jd.random.key(0))
    step = stepper(objective, rule)
    graph = ours is jd.aligned_mtl and labels is jd.by_layer
    ended = train(lambda p, s, *batch: step(p, s, batch), params, state, data, graph=graph)

    def adapted():
        return jd.interop.torchjd_aggregator(ours(), key=jd.random.key(0))

    for make in (theirs, adapted):
        groups: list[Any] = []

        def update(modules, *batch, make=make, groups=groups):
            if not groups:
                groups += [(part, make()) for part in parts(modules["trunk"])]
            z, losses = their_losses(modules, *batch)
            mtl_backward(losses, features=z)
            for part, aggregator in groups:
                jac_to_grad(part.parameters(), aggregator)

        same(by_parts(ended), fit(modules, data, update), 1e-9)
    loop = task_loop(rule, jd.random.key(0))
    same(by_parts(ended), fit(modules, data, loop), 1e-9)


class TwoTasks(lightning.LightningModule):
    """Manual optimisation: the trainer owns the loop, torch the optimiser, the step is ours."""

    def __init__(self, modules, way):
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleDict(modules)
        self.objective, _ = as_multitask(modules)
        self.way = way
        self.rule_state: Any = ()
        self.aggregator = jd.interop.torchjd_aggregator(jd.upgrad())

    def training_step(self, batch, batch_idx):
        getattr(self, self.way)(batch)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()

    def by_torchjd(self, batch):
        modules: Any = self.parts
        z, losses = their_losses(modules, *batch)
        mtl_backward(losses, features=z)
        jac_to_grad(modules["trunk"].parameters(), self.aggregator)

    def by_loop(self, batch):
        modules: Any = self.parts
        z, losses = their_losses(modules, *batch)
        call = jd.interop.backward_
        self.rule_state = call(losses, self.parts, jd.upgrad(), self.rule_state, features=z)

    def by_function(self, batch):
        leaves = final(dict(self.parts.items()))
        shared, heads = leaves.pop("trunk"), leaves
        params = _tree.map(torch.Tensor.detach, (shared, heads))
        step = jd.grad(self.objective, jd.upgrad())
        grads, self.rule_state = step(self.rule_state, params, batch)
        jd.interop.assign_grads_((shared, heads), grads)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning")
@pytest.mark.parametrize("way", ["by_function", "by_loop", "by_torchjd"])
def test_lightning(tmp_path, way):
    modules, data = two_tasks()
    twins, _ = two_tasks()
    for name, module in modules.items():
        twins[name].load_state_dict(module.state_dict())
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    flat = TensorDataset(*(part.flatten(0, 1) for part in data))
    trainer.fit(TwoTasks(modules, way), DataLoader(flat, batch_size=16))
    assert trainer.global_step == N_STEPS

    optimizer = torch.optim.Adam(all_parameters(twins), lr=0.01)
    aggregator = EXACT.aggregator()
    for batch in zip(*data, strict=True):
        z, losses = their_losses(twins, *batch)
        mtl_backward(losses, features=z)
        jac_to_grad(twins["trunk"].parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
    same(final(modules), final(twins), 1e-9)
    assert_trees_close(final(modules), final(twins), rtol=1e-6, atol=1e-9)
