"""No graph of plain autograd goes in or comes out; what torch.func tracks does both."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

import torchjd_func as jd
from tests.differentiate.objectives import (
    MULTITASK,
    MULTITASK_PARAMS,
    OBJECTIVES,
    PARAMS,
    ROUTES,
    RULE,
    X,
    tree_losses,
)
from tests.helpers import assert_differentiable, assert_trees_close, compiled
from torchjd_func import _tree


def tracked(tree):
    """Return the same tensors, as autograd of plain torch would track them."""
    return _tree.map(lambda x: x.clone().requires_grad_(x.is_floating_point()), tree)


def assert_values(tree):
    assert not any(leaf.requires_grad for leaf in _tree.tensors(tree))


@pytest.mark.parametrize("fn", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("route", ROUTES)
def test_results_are_values(fn, route):
    params, x, options = tracked(PARAMS), X.clone().requires_grad_(), {"route": route}
    rule = jd.smoothed(RULE)
    step = jd.grad_and_value(fn, rule, **options)
    first = step(None, params, x)
    with pytest.warns(UserWarning, match=r"Tensors \['weights'\] of the state require a gradient"):
        second = step(tracked(first[2]), params, x)
    assert_values((first, second))
    assert_trees_close(first, step(None, PARAMS, X))
    assert_values(jd.gramian_and_value(fn, **options)(params, x))
    assert_values(jd.cross_gramian(fn, **options)(params, (x,), (x,)))
    losses, matrix, vjp_fn = jd.gramian_vjp(fn, params, x, **options)
    assert_values((losses, matrix, vjp_fn(torch.ones(len(matrix)).requires_grad_())))
    assert_values(jd.jac_and_value(fn)(params, x))
    assert_values(jd.grad_and_value(fn, jd.scalarizers.uw())(None, params, x))


def test_constants_of_the_objective_are_values_too():
    teacher = nn.Linear(3, 2).double()

    def losses(params, x):
        student = functional_call(teacher, params, (x,))
        return (student - teacher(x) - 1).square().mean(0), {"teacher": teacher(x)}

    params = tracked({name: leaf.detach() + 0.1 for name, leaf in teacher.named_parameters()})
    step = jd.grad_and_value(losses, jd.smoothed(jd.upgrad()), has_aux=True)
    with pytest.warns(UserWarning, match="not differentiated"):
        eager = step(None, params, X)
    assert_values(eager)
    fast, counter = compiled(step)
    got = fast(None, params, X)
    assert_values(got)
    assert_trees_close(got, eager)
    assert counter.graphs == 1
    tasks = jd.multitask(lambda w, x: x @ w + teacher(x).sum(), {"a": lambda p, z, x: z.mean()})
    given = (torch.ones(3, dtype=torch.float64, requires_grad=True), {"a": ()})
    with pytest.warns(UserWarning, match="not differentiated"):
        assert_values(jd.grad_and_value(tasks, jd.upgrad())(None, given, X))


def nodes(tensors):
    """Count the nodes of the graph behind tensors."""
    seen, left = set(), [x.grad_fn for x in tensors if x.grad_fn is not None]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left.extend(parent for parent, _ in node.next_functions)
    return len(seen)


def test_training_with_parameters_of_a_module_keeps_no_graph():
    model = nn.Linear(3, 2).double()
    rule = jd.smoothed(jd.upgrad())

    def losses(params, x):
        return functional_call(model, params, (x,)).square().mean(0)

    step, state, counts = jd.grad(losses, rule), None, []
    for _ in range(5):
        grads, state = step(state, dict(model.named_parameters()), X)
        counts.append(nodes(_tree.tensors((grads, state))))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.01 * grads[name]
    assert counts == [0] * 5


def test_ensembles_of_parameters_of_modules():
    stacked = _tree.map(lambda leaf: torch.stack([leaf, -leaf]).requires_grad_(), PARAMS)
    step = jd.ensemble.each(lambda params: jd.grad(tree_losses, RULE)(None, params, X))
    grads, _ = step(stacked)
    assert_values(grads)
    assert_values(vmap(lambda params: jd.grad(tree_losses, RULE)(None, params, X)[0])(stacked))


def test_what_torch_func_tracks_stays():
    def length(x):
        grads = jd.grad(tree_losses, jd.mgda())(None, PARAMS, x)[0]
        return _tree.ravel(grads).square().sum()

    assert_differentiable(length, X)
    direction = torch.ones_like(X)
    pushed = torch.func.jvp(length, (X,), (direction,))[1]
    torch.testing.assert_close(pushed, torch.func.grad(length)(X).sum())

    def of_shared(x):
        grads = jd.grad(MULTITASK, RULE)(None, MULTITASK_PARAMS, x)[0]
        return _tree.ravel(grads).square().sum()

    assert_differentiable(of_shared, X)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_what_torch_func_tracks_stays_compiled(transform):
    def length(x):
        return _tree.ravel(jd.grad(tree_losses, RULE)(None, PARAMS, x)[0]).square().sum()

    run = {
        "grad": torch.func.grad(length),
        "jvp": lambda x: torch.func.jvp(length, (x,), (x,))[1],
        "vmap": lambda x: vmap(length)(torch.stack([x, -x])),
    }[transform]
    fast, _ = compiled(run)
    torch.testing.assert_close(fast(X), run(X))
    leaf = X.clone().requires_grad_()
    if transform == "vmap":
        assert not fast(leaf).requires_grad


NET = nn.Linear(3, 2).double()
NET_PARAMS = {name: leaf.detach() for name, leaf in NET.named_parameters()}
INDEPENDENT = {
    "the module itself": lambda params, x: NET(x).square().mean(0),
    "detached": lambda params, x: functional_call(NET, params, (x,)).square().mean(0).detach(),
    "a constant": lambda params, x: x.mean(0)[:2],
    "the module, in a tree": lambda params, x: {"a": NET(x).mean(), "b": x.mean()},
}


@pytest.mark.parametrize("fn", INDEPENDENT.values(), ids=INDEPENDENT)
@pytest.mark.parametrize("rule", [RULE, jd.mean(), jd.trimmed_mean(0), jd.scalarizers.mean()])
def test_losses_that_depend_on_nothing_are_an_error(fn, rule):
    message = r"`losses` must depend on .*Call apply\(params, \.\.\.\)"
    step = jd.grad(fn, rule)
    with pytest.raises(ValueError, match=message):
        step(None, NET_PARAMS, X)
    with pytest.raises(Exception, match=message):
        compiled(step)[0](None, NET_PARAMS, X)
    with pytest.raises(ValueError, match=message):
        jd.jac(fn)(NET_PARAMS, X)


FEATURES = {
    "the module itself": lambda params, x: NET(x),
    "detached after all uses": lambda params, x: functional_call(NET, params, (x,)).detach(),
    "detached": lambda params, x: functional_call(NET, _tree.map(torch.detach, params), (x,)),
    "a constant": lambda params, x: x,
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("route", ROUTES)
def test_losses_of_examples_that_depend_on_nothing_are_an_error(features, route):
    objectives = {
        "batched": jd.instancewise(lambda params, x: features(params, x).square().sum(1)),
        "mapped": jd.per_example(lambda params, x: features(params, x).square().sum()),
    }
    for objective in objectives.values():
        for _ in range(2):  # as planned, too
            with pytest.raises(ValueError, match="`losses` must depend on"):
                jd.gramian(objective, route=route)(NET_PARAMS, X)
    tasks = jd.multitask(features, {"a": lambda p, z, x: z.mean()})
    with pytest.raises(ValueError, match="`losses` must depend on"):
        jd.gramian(tasks, route=route)((NET_PARAMS, {"a": ()}), X)


@pytest.mark.filterwarnings("ignore:An instance-wise objective is compiled without a plan")
def test_losses_of_examples_that_depend_on_nothing_are_an_error_in_graphs():
    objective = jd.instancewise(lambda p, x: FEATURES["detached after all uses"](p, x).sum(1))
    with pytest.raises(Exception, match="`losses` must depend on"):
        compiled(jd.gramian(objective))[0](NET_PARAMS, X)


def test_some_losses_may_depend_on_nothing():
    def losses(params, x):
        return {**tree_losses(params, x), "constant": x.mean()}

    jac = jd.jac(losses)(PARAMS, X)
    assert not jac["last"][3].any()
    assert_trees_close(_tree.map(lambda leaf: leaf[:3], jac), jd.jac(tree_losses)(PARAMS, X))


@pytest.mark.parametrize("kind", ["taken out", "replaced"])
def test_containers_are_those_of_one_run(kind):
    """A run may take labels out of its batch; the first call has several runs."""

    def losses(w, batch, items):
        x = batch.pop("x") if kind == "taken out" else batch["x"]
        items[0] = items[0] * 2
        return (x @ w * items[0]).square()

    x, factor = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    batch, items = {"x": x}, [factor]
    for _ in range(2):
        gramian = jd.gramian(jd.instancewise(losses))(torch.ones_like(factor), batch, items)
        torch.testing.assert_close(gramian, 64 * x)
    assert batch["x"] is x
    assert items[0] is factor
