"""Every scalarizer compiled, mapped, and handed to jd.grad."""

import pytest
import torch
from torch.func import functional_call, vmap

import torchjd_func as jd
from tests.helpers import assert_trees_close, compiled
from tests.scalarizer_registry import (
    MATRIX,
    METHODS,
    L,
    affine,
    experienced,
    fresh,
    gradient,
)
from torchjd_func import _tree

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def test_inductor_agrees_with_eager():
    scalarizer = jd.scalarizers.famo()
    step = jd.grad_and_value(affine, scalarizer)
    state, x = scalarizer.init(L), torch.zeros(3, dtype=torch.float64)
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True)
    assert_trees_close(fast(state, x), step(state, x))


@pytest.mark.parametrize(
    ("make", "sweep"),
    [
        (jd.scalarizers.constant, torch.rand(3, 4)),
        (jd.scalarizers.tchebycheff, torch.rand(3, 4)),
        (jd.scalarizers.pbi, torch.rand(3, 4)),
        (lambda r: jd.scalarizers.cosmos(r, 1.0), torch.rand(3, 4)),
        (lambda r: jd.scalarizers.hypervolume(r), 5 + torch.rand(3, 4)),
        (lambda nadir: jd.scalarizers.stch(nadir=nadir), 1 + torch.rand(3, 4)),
        (lambda b: jd.scalarizers.famo(min_losses=b), -torch.rand(3, 4)),
        (jd.scalarizers.stch, torch.tensor([0.1, 1.0, 10.0])),
        (jd.scalarizers.p_norm, torch.tensor([1.0, 2.0, 8.0])),
        (jd.scalarizers.power_mean, torch.tensor([-1.0, 0.0, 2.0])),
        (jd.scalarizers.softmax, torch.tensor([-1.0, 0.0, 2.0])),
        (lambda k: jd.scalarizers.softmax(k, variant="log_mean_exp"), torch.tensor([-1.0, 0, 2])),
        (jd.scalarizers.cvar, torch.tensor([0.1, 0.5, 1.0])),
        (jd.scalarizers.group_dro, torch.tensor([0.0, 0.5, 1.0])),
        (jd.scalarizers.dwa, torch.tensor([0.5, 1.0, 2.0])),
        (lambda start: jd.scalarizers.uw(start=start), torch.tensor([-0.5, 0.0, 2.0])),
        (jd.scalarizers.log_sum, torch.tensor([0.0, 0.5, 1.0])),
        (lambda x: jd.scalarizers.pbi(theta=x), torch.tensor([0.0, 0.5, 1.0])),
        (lambda x: jd.scalarizers.hypervolume(slack=x), torch.tensor([1.1, 1.5, 2.0])),
        (lambda x: jd.scalarizers.augmented_tchebycheff(rho=x), torch.tensor([0.0, 0.1, 1.0])),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hyper_parameters_can_be_mapped_and_do_not_recompile(make, sweep, dtype):
    values, sweep = L.to(dtype), sweep.double()  # another dtype than the losses

    def both(parameter):
        scalarizer = make(parameter)
        loss, state = scalarizer(values)
        return loss, gradient(scalarizer, values, None), state

    want = [both(parameter) for parameter in sweep]
    assert_trees_close(vmap(both)(sweep), _tree.stack(want), rtol=1e-6, atol=1e-6)
    fast, counter = compiled(both)
    for parameter, expected in zip(sweep, want, strict=True):
        assert_trees_close(fast(parameter), expected, rtol=1e-6, atol=1e-6)
    assert counter.graphs == 1


class Counted(torch.autograd.Function):
    """The identity, counting how often it is run forward and backward."""

    forwards = backwards = 0

    @staticmethod
    def forward(x):
        Counted.forwards += 1
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        Counted.backwards += 1
        return grads[0]


@every_method
def test_one_forward_and_one_backward_pass(method):
    scalarizer, state = fresh(method, L, 4)
    Counted.forwards = Counted.backwards = 0

    def objective(x):
        return affine(Counted.apply(x))

    jd.grad(objective, scalarizer)(state, torch.zeros(3, dtype=torch.float64))
    assert (Counted.forwards, Counted.backwards) == (1, 1)


@every_method
def test_grad_is_the_jacobian_weighted_by_the_gradient(method):
    scalarizer, state = experienced(method, L)
    x = torch.zeros(3, dtype=torch.float64)

    def objective(x):
        rows = affine(x)
        return {"b": rows[2:], "a": (rows[0], rows[1])}, {"seen": rows * 2}

    grads, aux, later = jd.grad(objective, scalarizer, has_aux=True)(state, x)
    torch.testing.assert_close(grads, MATRIX.mT @ gradient(scalarizer, L, state))
    assert_trees_close(aux, {"seen": L * 2})
    assert_trees_close(later, scalarizer(L, state)[1])


@every_method
def test_grad_of_instancewise_objective(method):
    scalarizer, state = fresh(method, L, 4)
    objective = jd.instancewise(lambda x, rows, offsets: rows @ x + offsets)
    x = torch.zeros(3, dtype=torch.float64)
    grads, values, _ = jd.grad_and_value(objective, scalarizer)(state, x, MATRIX, L)
    torch.testing.assert_close(values, L)
    torch.testing.assert_close(grads, MATRIX.mT @ gradient(scalarizer, L, state))


@every_method
def test_grad_of_multitask_objective_weighs_heads_too(method):
    heads = {
        "b": lambda p, z, batch: (p["w"] * z).square().sum() + 0.1,
        "a": lambda p, z, batch: (p * z).exp().sum(),
    }
    objective = jd.multitask(lambda shared, batch: batch @ shared, heads)
    shared = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    params = (shared, {"a": torch.tensor(0.7).double(), "b": {"w": torch.ones(4).double()}})
    values = objective(params, MATRIX)
    scalarizer, state = fresh(method, values, 2)
    grads, got, _ = jd.grad_and_value(objective, scalarizer)(state, params, MATRIX)
    assert_trees_close(got, values)
    weights = gradient(scalarizer, values, state)
    want = torch.func.grad(
        lambda p: sum((weights[k] * v for k, v in objective(p, MATRIX).items()), torch.tensor(0))
    )(params)
    assert_trees_close(grads, want)


def test_a_model_learns_together_with_its_uncertainties():
    scalarizer = jd.scalarizers.uw()
    model = torch.nn.Linear(3, 2).double()
    inputs = torch.cat([MATRIX, MATRIX.square(), MATRIX.flip(-1)])
    targets = torch.stack([inputs[:, 0].abs(), 5 * inputs.prod(-1)], -1)  # not linear
    params = {name: torch.zeros_like(value) for name, value in model.named_parameters()}

    def objective(params):
        return (functional_call(model, params, inputs) - targets).square().mean(0)

    def loss(trained):
        return scalarizer(objective(trained[0]), trained[1])[0]

    trained = params, scalarizer.init(torch.zeros(2, dtype=torch.float64))
    for _ in range(3000):
        slopes = torch.func.grad(loss)(trained)
        trained = _tree.map(lambda value, slope: value - 0.05 * slope, trained, slopes)
    optimum = objective(trained[0]).log()  # of the log-variances, at these losses
    assert float(optimum[1] - optimum[0]) > 1
    torch.testing.assert_close(trained[1].log_variance, optimum, rtol=0, atol=5e-3)
