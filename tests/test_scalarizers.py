"""What every scalarizer promises, whatever it computes."""

import pytest
import torch
from torch.func import functional_call, vmap

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, clone, compiled
from tests.scalarizer_registry import (
    METHODS,
    experienced,
    exported,
    fresh,
    gradient,
    key_for,
    losses,
    observe,
)
from torchjd_func import _tree

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
L = losses(4)
MATRIX = torch.tensor(
    [[1.0, -2.0, 0.5], [0.0, 1.0, 3.0], [-1.0, 0.5, 0.2], [2.0, 2.0, -1.0]], dtype=torch.float64
)


def affine(x):
    """Four losses that are `L` at the origin, with the Jacobian `MATRIX`."""
    return MATRIX.to(x.dtype) @ x + L.to(x.dtype)


def test_every_exported_scalarizer_is_listed():
    assert {exported(name) for name in METHODS} == set(jd.scalarizers.__all__)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_in_is_dtype_out(method, dtype):
    values = L.to(dtype)
    scalarizer, state = fresh(method, values, 4)
    loss, later = scalarizer(values, state)
    got = gradient(scalarizer, values, state)
    assert (loss.shape, loss.dtype, got.dtype) == ((), dtype, dtype)
    assert_same_layout(later, state)
    exact = values.double()
    want_loss, _ = scalarizer(exact, state)
    want = gradient(scalarizer, exact, state)
    tolerance = {torch.float64: 0.0, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.double(), want_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_is_kept_in_float32_or_better(method, dtype):
    _, state = fresh(method, L.to(dtype), 4)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    floating = [leaf for leaf in _tree.leaves(state) if leaf.is_floating_point()]
    assert all(leaf.dtype == want for leaf in floating)


@every_method
def test_loss_is_not_computed_in_low_precision(method):
    values = L.to(torch.bfloat16)
    scalarizer, state = fresh(method, values, 4)
    wide, _ = scalarizer(values.float(), state)
    assert torch.equal(scalarizer(values, state)[0], wide.to(torch.bfloat16))


@every_method
def test_pytree_equals_vector(method):
    tree = {"z": L[3], "a": (L[:2].reshape(1, 2), None), "b": [L[2:3]]}
    scalarizer, state = fresh(method, tree, 4)
    vector_state = scalarizer.init(L, key=key_for(method))
    assert_trees_close(scalarizer(tree, state), scalarizer(L, vector_state), rtol=0, atol=0)
    del tree["a"]
    tree["c"] = L[:2].reshape(1, 2)
    order = torch.tensor([2, 0, 1, 3])  # names are sorted
    got = gradient(scalarizer, tree, state)
    assert_trees_close(_tree.ravel(got), gradient(scalarizer, L[order], vector_state))


@every_method
def test_state_keeps_structure_shapes_and_dtypes(method):
    _, start = fresh(method, L, 4)
    _, later = experienced(method, L)
    assert_same_layout(later, start)
    assert all(isinstance(leaf, torch.Tensor) for leaf in _tree.leaves(start))


@every_method
def test_state_holds_no_graph(method):
    scalarizer, state = fresh(method, L, 4)
    values = L.clone().requires_grad_()
    _, later = scalarizer(values, state)
    later = observe(method, scalarizer, values, later)
    assert not any(leaf.requires_grad for leaf in _tree.leaves(later))


@every_method
def test_nothing_is_mutated(method):
    scalarizer, state = experienced(method, L)
    before = clone((L, state)), torch.get_rng_state()
    _, later = scalarizer(L, state)
    observe(method, scalarizer, L, later)
    gradient(scalarizer, L, state)
    assert_trees_close((L, state), before[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before[1])
    assert_trees_close(scalarizer(L, state), scalarizer(L, state), rtol=0, atol=0)


@every_method
def test_init_reads_shapes_only(method):
    scalarizer, state = fresh(method, L, 4)
    nothing = torch.full_like(L, torch.nan)
    assert_trees_close(scalarizer.init(nothing, key=key_for(method)), state, rtol=0, atol=0)
    point = torch.zeros(3, dtype=torch.float64)
    derived = jd.init_state(scalarizer, affine, point, key=key_for(method))
    assert_trees_close(derived, state, rtol=0, atol=0)


@every_method
def test_no_state_is_a_fresh_state(method):
    scalarizer = method.make(4)
    if method.random:
        with pytest.raises(ValueError, match=r"jd\.random\.key"):
            scalarizer(L)
        with pytest.raises(ValueError, match=r"jd\.random\.key"):
            scalarizer.init(L)
        return
    assert_trees_close(scalarizer(L), scalarizer(L, scalarizer.init(L)), rtol=0, atol=0)


@every_method
def test_three_steps_are_one_graph(method):
    scalarizer, state = fresh(method, L, 4)
    gradients = jd.grad_and_value(affine, scalarizer)

    def step(state, x):
        grads, values, state = gradients(state, x)
        x = x - 1e-2 * grads
        return x, values, observe(method, scalarizer, affine(x), state)

    fast, counter = compiled(step)
    eager = got = (torch.zeros(3, dtype=torch.float64), L, state)
    for _ in range(3):
        eager, got = step(eager[2], eager[0]), fast(got[2], got[0])
        assert_trees_close(got, eager)
    assert counter.graphs == 1


def test_inductor_agrees_with_eager():
    scalarizer = jd.scalarizers.famo()
    step = jd.grad_and_value(affine, scalarizer)
    state, x = scalarizer.init(L), torch.zeros(3, dtype=torch.float64)
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True)
    assert_trees_close(fast(state, x), step(state, x))


@every_method
def test_vmap_equals_loop(method):
    batch = torch.stack([L, L.flip(0), L * 2, torch.full_like(L, 1.5)])
    keys = jd.random.split(jd.random.key(0), len(batch)) if method.random else None
    scalarizer = method.make(4)

    def two_steps(values, key):
        state = scalarizer.init(values, key=key)
        first, state = scalarizer(values, state)
        state = observe(method, scalarizer, values * 0.9, state)
        return first, gradient(scalarizer, values, state), state

    got = vmap(two_steps, in_dims=(0, None if keys is None else 0))(batch, keys)
    loop = [two_steps(row, None if keys is None else keys[i]) for i, row in enumerate(batch)]
    assert_trees_close(got, _tree.stack(loop), rtol=1e-12, atol=1e-13)


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


@every_method
def test_gradient_is_that_of_the_value(method):
    scalarizer, state = fresh(method, L, 4)

    def loss(values):
        return scalarizer(values, state)[0]

    values = L.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, values, raise_exception=method.exact) == method.exact


@every_method
def test_gradient_is_a_convex_combination_where_claimed(method):
    seen = []
    for values in (L, L.flip(0), 3 * L + 1):
        for scalarizer, state in (fresh(method, values, 4), experienced(method, values)):
            got = gradient(scalarizer, values, state)
            seen.append(bool((got >= 0).all()) and abs(float(got.sum()) - 1) < 1e-9)
    assert all(seen) == method.convex


@every_method
def test_order_of_the_losses_does_not_matter_where_claimed(method):
    order = torch.tensor([2, 0, 3, 1])
    scalarizer, state = fresh(method, L, 4)
    loss, got = scalarizer(L, state)[0], gradient(scalarizer, L, state)
    same = torch.allclose(scalarizer(L[order], state)[0], loss, rtol=1e-9)
    same &= torch.allclose(gradient(scalarizer, L[order], state), got[order], rtol=1e-9)
    assert same == method.equivariant


@every_method
def test_value_is_homogeneous_where_claimed(method):
    scalarizer, state = fresh(method, L, 4)
    loss = float(scalarizer(L, state)[0])
    degree = 1.0 if method.degree is None else method.degree
    same = [
        float(scalarizer(scale * L, state)[0]) == pytest.approx(scale**degree * loss, rel=1e-7)
        for scale in (1e-6, 3.0, 1e6)
    ]
    assert all(same) == (method.degree is not None)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 10.0])
def test_loss_and_gradient_are_finite(method, dtype, scale):
    for m in (1, 2, 5):
        values = (scale * losses(m)).to(dtype)
        scalarizer, state = experienced(method, values)
        loss, _ = scalarizer(values, state)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient(scalarizer, values, state)).all()


@every_method
def test_zero_losses(method):
    zero = torch.zeros(3, dtype=torch.float64)
    scalarizer, state = fresh(method, zero, 3)
    loss, _ = scalarizer(zero, state)
    got = gradient(scalarizer, zero, state)
    assert bool(torch.isfinite(loss) and torch.isfinite(got).all()) == method.finite_at_zero


@every_method
def test_state_of_another_size_is_an_error(method):
    scalarizer, state = fresh(method, L, 4)
    if method.random:
        return  # a key serves any number of losses
    if not _tree.leaves(state):
        with pytest.raises(ValueError, match="state"):
            scalarizer(L, (torch.zeros(4),))
        return
    double = method.make(8)
    with pytest.raises(ValueError, match="state"):
        double(torch.cat([L, L]), state)


@every_method
def test_observations_of_another_size_are_an_error(method):
    scalarizer, state = fresh(method, L, 4)
    assert (scalarizer.observe is not None) == bool(method.observes)
    if scalarizer.observe is not None:
        with pytest.raises(ValueError, match="losses"):
            scalarizer.observe(torch.cat([L, L]), state)


@every_method
def test_repr_is_one_line(method):
    scalarizer = method.make(4)
    assert repr(scalarizer) == f"Scalarizer({scalarizer.name})"


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
    for _ in range(4000):
        slopes = torch.func.grad(loss)(trained)
        trained = _tree.map(lambda value, slope: value - 0.05 * slope, trained, slopes)
    optimum = objective(trained[0]).log()  # of the log-variances, at these losses
    assert float(optimum[1] - optimum[0]) > 1
    torch.testing.assert_close(trained[1].log_variance, optimum, rtol=0, atol=1e-3)
