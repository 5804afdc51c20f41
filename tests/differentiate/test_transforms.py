"""Jacobians and Gramians against plain autograd, for every argument and every route."""

import pytest
import torch
from torch.func import functional_call, vmap

import torchjd_func as jd
from tests import oracles
from tests.helpers import assert_differentiable, assert_trees_close, clone, compiled
from torchjd_func import _tree

PARAMS = {
    "w": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "unused": torch.ones(2, dtype=torch.float64),
}
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
CHUNKS = [None, 1, 2, 3, 100]
ROUTES = ["auto", "jacobian", "product"]


def vector_losses(params, x):
    return (x @ params["w"] + params["b"]).tanh().square().mean(0)


def matrix_losses(params, x):
    return (x @ params["w"] + params["b"]).tanh().reshape(-1, 2)[:3]


def tree_losses(params, x):
    out = (x @ params["w"] + params["b"]).tanh()
    return {"late": out[:2, 0], "early": (out.square().mean(), [out[0].sum(), None])}


def scalar_loss(params, x):
    return vector_losses(params, x).sum()


def instance_losses(params, x):
    return (x @ params["w"] + params["b"]).tanh().square().sum(1)


def flat(fn):
    """Return the losses of `fn` as one vector in leaf order."""
    return lambda params, *args: _tree.ravel(fn(params, *args))


OBJECTIVES = {
    "vector": vector_losses,
    "matrix": matrix_losses,
    "tree": tree_losses,
    "scalar": scalar_loss,
    "instancewise": jd.instancewise(instance_losses),
    "per_example": jd.per_example(
        lambda params, x: (x @ params["w"] + params["b"]).tanh().square().sum()
    ),
}
every_objective = pytest.mark.parametrize("fn", OBJECTIVES.values(), ids=OBJECTIVES.keys())


@every_objective
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_jacobian_equals_autograd(fn, chunk_size):
    got, losses = jd.jac_and_value(fn, chunk_size=chunk_size)(PARAMS, X)
    assert_trees_close(got, oracles.jacobian_by_loops(flat(fn), PARAMS, X))
    assert_trees_close(losses, fn(PARAMS, X))
    assert_trees_close(jd.jac(fn, chunk_size=chunk_size)(PARAMS, X), got)


@every_objective
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gramian_and_pullback_equal_autograd(fn, route, chunk_size):
    jac = oracles.jacobian_by_loops(flat(fn), PARAMS, X)
    options = {"route": route, "chunk_size": chunk_size}
    want = _tree.gramian(jac)
    got, losses = jd.gramian_and_value(fn, **options)(PARAMS, X)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(jd.gramian(fn, **options)(PARAMS, X), want)
    losses_2, got_2, vjp_fn = jd.gramian_vjp(fn, PARAMS, X, **options)
    torch.testing.assert_close(got_2, want)
    assert_trees_close(losses_2, losses)
    weights = torch.linspace(-1, 2, len(want), dtype=torch.float64)
    pulled = {name: torch.tensordot(weights, rows, 1) for name, rows in jac.items()}
    assert_trees_close(vjp_fn(weights), pulled)


@every_objective
@pytest.mark.parametrize("route", ROUTES)
def test_cross_gramian_equals_autograd(fn, route):
    other = X[:3] * 2 - 1
    first, second = (oracles.jacobian_by_loops(flat(fn), PARAMS, x) for x in (X, other))
    want = sum(first[k].flatten(1) @ second[k].flatten(1).mT for k in PARAMS)
    got = jd.cross_gramian(fn, route=route)(PARAMS, (X,), (other,))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rule", [jd.upgrad(), jd.mean()], ids=repr)
def test_auxiliary_output_goes_through(route, rule):
    def fn(params, x):
        return vector_losses(params, x), {"out": (x @ params["w"]).detach(), "n": torch.ones(2)}

    aux = fn(PARAMS, X)[1]
    plain = jd.jac(vector_losses)(PARAMS, X)
    assert_trees_close(jd.jac(fn, has_aux=True)(PARAMS, X), (plain, aux))
    losses = vector_losses(PARAMS, X)
    assert_trees_close(jd.jac_and_value(fn, has_aux=True)(PARAMS, X), (plain, (losses, aux)))
    gramian = jd.gramian(vector_losses)(PARAMS, X)
    options = {"has_aux": True, "route": route}
    assert_trees_close(jd.gramian(fn, **options)(PARAMS, X), (gramian, aux))
    got = jd.gramian_and_value(fn, **options)(PARAMS, X)
    assert_trees_close(got, (gramian, (losses, aux)))
    out, matrix, _, aux_2 = jd.gramian_vjp(fn, PARAMS, X, **options)
    assert_trees_close((out, matrix, aux_2), (losses, gramian, aux))
    crossed = jd.cross_gramian(fn, **options)(PARAMS, (X,), (X,))
    assert_trees_close(crossed, (gramian, (aux, aux)))
    grads, state = jd.grad(vector_losses, rule)(None, PARAMS, X)
    assert_trees_close(jd.grad(fn, rule, **options)(None, PARAMS, X), (grads, aux, state))
    got = jd.grad_and_value(fn, rule, **options)(None, PARAMS, X)
    assert_trees_close(got, (grads, (losses, aux), state))
    assert jd.init_state(rule, fn, PARAMS, X, has_aux=True) == ()


@pytest.mark.parametrize("argnums", [1, -1, (0, 1), (1, 0), (1,)])
def test_argnums(argnums):
    params = {k: v for k, v in PARAMS.items() if k != "unused"}

    def losses_of(x, params):
        return vector_losses(params, x)

    values = (X, params)
    wanted = argnums if isinstance(argnums, tuple) else (argnums,)
    by_x = oracles.jacobian_by_loops(lambda p: losses_of(p["x"], params), {"x": X})["x"]
    oracle = (by_x, oracles.jacobian_by_loops(lambda p: losses_of(X, p), params))
    want = tuple(oracle[i % 2] for i in wanted)
    want = want if isinstance(argnums, tuple) else want[0]
    assert_trees_close(jd.jac(losses_of, argnums)(*values), want)
    grads, _ = jd.grad(losses_of, jd.sum(), argnums)(None, *values)
    assert_trees_close(grads, _tree.map(lambda rows: rows.sum(0), want))
    gramian = sum(leaf.flatten(1) @ leaf.flatten(1).mT for leaf in _tree.leaves(want))
    torch.testing.assert_close(jd.gramian(losses_of, argnums)(*values), gramian)
    assert jd.init_state(jd.upgrad(), losses_of, *values, argnums=argnums) == ()


def test_the_batch_may_come_after_several_shared_arguments():
    def fn(scale, params, x):
        return scale * vector_losses(params, x)

    got = jd.cross_gramian(fn, argnums=1)(torch.tensor(3.0), PARAMS, (X,), (X,))
    torch.testing.assert_close(got, 9 * jd.gramian(vector_losses)(PARAMS, X))


def test_dropout_is_drawn_once_for_losses_gramian_and_pullback():
    def fn(w, x):
        return (torch.nn.functional.dropout(x, 0.5) @ w).square()

    w, x = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    for route in ROUTES:
        torch.manual_seed(0)
        losses, gramian, vjp_fn = jd.gramian_vjp(fn, w, x, route=route)
        torch.manual_seed(0)
        torch.testing.assert_close(losses, fn(w, x))
        rows = torch.stack([vjp_fn(row) for row in torch.eye(3, dtype=torch.float64)])
        torch.testing.assert_close(gramian, rows.flatten(1) @ rows.flatten(1).mT)


def test_complex_parameters_have_a_real_gramian():
    z = torch.randn(4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))

    def fn(z):
        return (mix @ z).abs().square()

    real = jd.jac(lambda pair: fn(torch.view_as_complex(pair)))(torch.view_as_real(z))
    want = real.flatten(1) @ real.flatten(1).mT
    for route in ROUTES:
        torch.testing.assert_close(jd.gramian(fn, route=route)(z), want)
    grads, _ = jd.grad(fn, jd.upgrad())(None, z)
    want_grads, _ = jd.upgrad()(real)
    torch.testing.assert_close(torch.view_as_real(grads), want_grads)


def test_transforms_nest_in_torch_func():
    def length(x):
        grads, _ = jd.grad(vector_losses, jd.upgrad())(None, PARAMS, x)
        return grads["w"].square().sum()

    assert_differentiable(length, X)
    directions = torch.stack([torch.ones_like(X), X])
    pushed = vmap(lambda v: torch.func.jvp(length, (X,), (v,))[1])(directions)
    slopes = torch.func.grad(length)(X)
    torch.testing.assert_close(pushed, (directions * slopes).sum((1, 2)))


def test_physics_losses_differentiate_inside_the_objective():
    def residual(w, x):
        second = vmap(torch.func.grad(torch.func.grad(lambda x: (w * x).sin().sum())))(x)
        return torch.stack([(second + x).square().mean(), (w * x[0]).sin().sum()])

    w = torch.tensor([0.7, 1.3], dtype=torch.float64)
    points = torch.linspace(0, 1, 5, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda w: residual(w, points), w)
    for route in ROUTES:
        torch.testing.assert_close(jd.gramian(residual, route=route)(w, points), rows @ rows.mT)


H = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
SHARED = torch.tensor([1.0, -1.0], dtype=torch.float64)
HEADS = {
    "two": lambda p, z, batch: 0.5 * p * z.square().sum(),
    "one": lambda p, z, batch: p @ z,
}
HEAD_PARAMS = {
    "one": torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64),
    "two": torch.tensor(0.5, dtype=torch.float64),
}


class TestMultitask:
    def objective(self):
        return jd.multitask(lambda shared, batch: batch @ shared, HEADS)

    def test_published_example(self):
        params = (SHARED, HEAD_PARAMS)
        step = jd.grad_and_value(self.objective(), jd.upgrad())
        (shared, heads), losses, _ = step(None, params, H)
        torch.testing.assert_close(shared, torch.tensor([-2.0, -1.75], dtype=torch.float64))
        torch.testing.assert_close(float(losses["one"]), -2.0)
        torch.testing.assert_close(float(losses["two"]), 0.75)
        torch.testing.assert_close(heads["one"], -torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(float(heads["two"]), 1.5)

    @pytest.mark.parametrize("chunk_size", CHUNKS)
    def test_jacobian_is_that_of_the_shared_parameters(self, chunk_size):
        params = (SHARED, HEAD_PARAMS)
        got, losses = jd.jac_and_value(self.objective(), chunk_size=chunk_size)(params, H)
        want = torch.tensor([[-2.0, 0.0], [-2.0, -3.5]], dtype=torch.float64)
        torch.testing.assert_close(got, want)
        assert_trees_close(losses, self.objective()(params, H))

    @pytest.mark.parametrize("route", ROUTES)
    def test_gramian_vjp(self, route):
        params = (SHARED, HEAD_PARAMS)
        jac = jd.jac(self.objective())(params, H)
        _, gramian, vjp_fn = jd.gramian_vjp(self.objective(), params, H, route=route)
        torch.testing.assert_close(gramian, jac @ jac.mT)
        weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        shared, heads = vjp_fn(weights)
        torch.testing.assert_close(shared, weights @ jac)
        torch.testing.assert_close(float(heads["two"]), 1.5)  # heads are not weighted

    def test_features_may_be_a_pytree_and_heads_without_parameters(self):
        objective = jd.multitask(
            lambda shared, x: {"a": x @ shared, "b": (x @ shared).sum()},
            {"x": lambda p, z, batch: z["a"].square().sum(), "y": lambda p, z, batch: z["b"]},
        )
        params = (SHARED, {"x": {}, "y": ()})
        want = jd.jac(lambda shared: objective((shared, params[1]), H))(SHARED)
        torch.testing.assert_close(jd.jac(objective)(params, H), want)

    def test_auxiliary_output_of_the_trunk(self):
        objective = jd.multitask(lambda w, x: (x @ w, x.sum()), HEADS, has_aux=True)
        params = (SHARED, HEAD_PARAMS)
        _, (losses, aux), _ = jd.grad_and_value(objective, jd.upgrad(), has_aux=True)(
            None, params, H
        )
        assert_trees_close((losses, aux), objective(params, H))
        assert aux == H.sum()

    def test_compiles_and_maps(self):
        params = (SHARED, HEAD_PARAMS)
        step = jd.grad_and_value(self.objective(), jd.upgrad())
        fast, counter = compiled(lambda params, x: step(None, params, x))
        assert_trees_close(fast(params, H), step(None, params, H))
        assert counter.graphs == 1
        batches = torch.stack([H, 2 * H])
        mapped = vmap(lambda x: step(None, params, x)[0][0])(batches)
        want = torch.stack([step(None, params, x)[0][0] for x in batches])
        torch.testing.assert_close(mapped, want)

    def test_init_state(self):
        params = (SHARED, HEAD_PARAMS)
        assert jd.init_state(jd.upgrad(), self.objective(), params, H) == ()


def test_scalarizers_cost_one_backward_and_weigh_heads_too():
    square = jd.Scalarizer(
        "square", lambda losses, key: (), lambda losses, state: (losses.square().sum(), state)
    )
    grads, state = jd.grad(tree_losses, square)(None, PARAMS, X)
    total = torch.func.grad(lambda p: _tree.ravel(tree_losses(p, X)).square().sum())(PARAMS)
    assert_trees_close(grads, total)
    assert state == ()
    case = TestMultitask()
    params = (SHARED, HEAD_PARAMS)
    (_, heads), losses, _ = jd.grad_and_value(case.objective(), square)(None, params, H)
    torch.testing.assert_close(heads["two"], 2 * losses["two"] * 1.5)


def test_inputs_are_not_changed():
    before = clone((PARAMS, X))
    for route in ROUTES:
        jd.grad_and_value(tree_losses, jd.upgrad(), route=route)(None, PARAMS, X)
    assert_trees_close((PARAMS, X), before, rtol=0, atol=0)


def test_init_state_computes_nothing():
    calls = []

    def fn(params, x):
        out = vector_losses(params, x)
        calls.append(type(torch.func.debug_unwrap(out)).__name__)
        return out

    before = torch.get_rng_state()
    jd.init_state(jd.upgrad(), fn, PARAMS, X)
    assert calls == ["FakeTensor"]
    assert torch.equal(torch.get_rng_state(), before)


def test_functional_call_composes():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    params = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(5, 3)
    got = jd.gramian(lambda p: functional_call(model, p, (x,)).square().mean(0))(params)
    assert not got.requires_grad
    rows = jd.jac(lambda p: functional_call(model, p, (x,)).square().mean(0))(params)
    torch.testing.assert_close(got, sum(r.flatten(1) @ r.flatten(1).mT for r in rows.values()))


def test_a_raveled_pytree_comes_back():
    tree = tree_losses(PARAMS, X)
    assert_trees_close(_tree.unravel(tree, _tree.ravel(tree)), tree, rtol=0, atol=0)
