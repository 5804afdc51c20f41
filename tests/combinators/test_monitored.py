"""Measures of what a rule sees and does, against formulas in numpy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, close, compiled, double, weighting
from tests.matrices import A, B, C, matrix
from tests.registry import METHODS, key_for, losses_for
from torchjd_func import _tree, measures

Array = np.ndarray


def _cosine(a: Array, b: Array) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths > 1e-12 else 0.0


def _pairs(jac: Array) -> list[float]:
    return [_cosine(jac[i], jac[j]) for i in range(len(jac)) for j in range(len(jac)) if i != j]


def _entropy(weights: Array) -> float:
    shares = np.abs(weights) / np.abs(weights).sum()
    return -sum(share * np.log(share) for share in shares if share > 0)


def _condition(jac: Array) -> float:
    values = np.linalg.svd(jac, compute_uv=False)
    return float(values[0] / values[values > 1e-7 * values[0]][-1])


def _dual_cone(jac: Array, weights: Array) -> float:
    norms = np.linalg.norm(jac, axis=1)
    mean = 1 / len(jac)
    slack, product = norms * (weights - mean), jac @ jac.T @ weights / norms
    return float(np.abs(np.minimum(slack, product)).max() / (norms * mean).max())


def _min_norm(jac: Array, weights: Array) -> float:
    direction = jac.T @ weights
    return (direction @ direction - (jac @ direction).min()) / (jac**2).sum(1).max()


# (jac, weights, update) -> value
FORMULAS: dict[str, Callable[[Array, Array, Array], Any]] = {
    "weights": lambda jac, w, d: w,
    "cosine_to_mean": lambda jac, w, d: _cosine(d, jac.mean(0)),
    "min_cosine": lambda jac, w, d: min(_cosine(row, d) for row in jac),
    "pairwise_cosine": lambda jac, w, d: np.array([[_cosine(a, b) for b in jac] for a in jac]),
    "conflict_fraction": lambda jac, w, d: np.mean(np.array(_pairs(jac)) < 0),
    "row_norms": lambda jac, w, d: np.linalg.norm(jac, axis=1),
    "entropy": lambda jac, w, d: _entropy(w),
    "condition_number": lambda jac, w, d: _condition(jac),
    "dual_cone_residual": lambda jac, w, d: _dual_cone(jac, w),
    "min_norm_residual": lambda jac, w, d: _min_norm(jac, w),
    "stationarity_gap": lambda jac, w, d: np.linalg.norm(
        jac.T @ weighting(jd.mgda())(torch.tensor(jac @ jac.T))[0].numpy()
    ),
}
ALL = {name: getattr(measures, name) for name in measures.__all__}
ROWS = {
    name: ALL[name]
    for name in ALL
    if name not in ("weights", "entropy", "dual_cone_residual", "min_norm_residual")
}
JACS = [A, B, C, matrix("gaussian", 4, 6, 1), matrix("scaled", 3, 5, 2)]


def test_every_measure_has_a_formula():
    assert set(FORMULAS) == set(measures.__all__)


@pytest.mark.parametrize("jac", JACS, ids=lambda jac: "x".join(map(str, jac.shape)))
@pytest.mark.parametrize("inner", [jd.mean(), jd.constant, jd.mgda(), jd.upgrad(), jd.dualproj()])
def test_measures_equal_formulas(inner, jac):
    weights = torch.arange(1, len(jac) + 1, dtype=jac.dtype) - 1.5
    rule = inner(weights) if inner is jd.constant else inner
    got, state = jd.monitored(rule, ALL)(jac)
    want, _ = rule(jac)
    assert_trees_close(got, want)
    values = jd.read_measures(state)
    seen = values["weights"].numpy()
    for name, formula in FORMULAS.items():
        number = np.asarray(formula(jac.numpy(), seen, want.numpy()))
        close(values[name], torch.from_numpy(number), atol=1e-6)


@pytest.mark.parametrize("inner", [jd.trimmed_mean(1), jd.grouped(jd.upgrad(), jd.by_tensor)])
def test_measures_of_rules_without_weights_use_the_rows(inner):
    jac = {"b": matrix("gaussian", 4, 6, 1).reshape(4, 2, 3), "a": matrix("gaussian", 4, 2, 2)}
    got, state = jd.monitored(inner, ROWS)(jac)
    assert_trees_close(got, inner(jac)[0])
    whole = torch.cat([jac["a"], jac["b"].flatten(1)], dim=1).numpy()
    update = torch.cat([got["a"], got["b"].flatten()]).numpy()
    for name, value in jd.read_measures(state).items():
        number = np.asarray(FORMULAS[name](whole, update, update))
        close(value, torch.from_numpy(number), atol=1e-6)


def test_values_of_the_literature():
    numbers = {"A": (A, 3.68869974), "B": (B, 3.61985973), "C": (C, 1.98586598)}
    for jac, want in numbers.values():
        _, state = jd.monitored(jd.mean(), {"c": measures.condition_number})(jac)
        close(jd.read_measures(state)["c"], want)


def test_zero_gradients_give_zeros():
    _, state = jd.monitored(jd.mgda(), ALL)(torch.zeros(3, 4, dtype=torch.float64))
    for name, value in jd.read_measures(state).items():
        if name not in ("weights", "entropy"):
            assert_trees_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("m", [2, 4])
def test_measures_of_gradients_that_are_not_finite_are_not_good(m, bad):
    jac = matrix("gaussian", m, 6, 1)
    jac[1, 0] = bad
    weights = torch.full((m,), 1 / m, dtype=torch.float64)
    by_weights = jd.Observation(jac @ jac.mT, weights, None, jac, weights @ jac)
    for seen in (by_weights, by_weights._replace(weights=None)):
        for name in ROWS if seen.weights is None else ALL.keys() - {"weights", "entropy"}:
            value = ALL[name](seen)
            # Signs of infinite products are known.
            assert not value.isfinite().all() or (name, bad) == ("conflict_fraction", torch.inf)
    assert ALL["entropy"](by_weights._replace(weights=weights * torch.nan)).isnan()


def test_measures_of_a_population_are_those_of_each_member():
    jacs = torch.stack([matrix("gaussian", 4, 6, 1), torch.full((4, 6), torch.nan).double()])
    watched = jd.monitored(jd.krum(1), {"condition": measures.condition_number})
    states = vmap(lambda jac: watched(jac)[1])(jacs)
    values = vmap(lambda state: jd.read_measures(state)["condition"])(states)
    close(values[0], jd.read_measures(watched(jacs[0])[1])["condition"])


def test_rows_of_float32_do_not_overflow():
    jac = 1e30 * matrix("gaussian", 4, 6, 1).float()
    _, state = jd.monitored(jd.trimmed_mean(1), {"cosine": measures.cosine_to_mean})(jac)
    _, near = jd.monitored(jd.trimmed_mean(1), {"cosine": measures.cosine_to_mean})(jac / 1e30)
    close(jd.read_measures(state)["cosine"], jd.read_measures(near)["cosine"], atol=1e-5)


def test_an_update_that_cancels_has_no_cosine():
    _, state = jd.monitored(jd.mgda(), ROWS)(C)
    values = jd.read_measures(state)
    assert values["min_cosine"] == 0
    assert values["cosine_to_mean"] == 0


RESIDUALS = {
    "mgda": measures.min_norm_residual,
    "dualproj": measures.dual_cone_residual,
    "upgrad": partial(measures.dual_cone_residual, complementary=False),
}


@pytest.mark.parametrize("kind", ["gaussian", "scaled", "duplicate", "opposite", "zero"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_tell_converged_from_not(name, kind):
    jac = matrix(kind, 5, 6, seed=2)
    exact, measure = weighting(getattr(jd, name)()), RESIDUALS[name]
    weights, _ = exact(jac @ jac.T)

    def residual(found):
        return measure(jd.Observation(jac @ jac.T, found, None, None, None))

    assert residual(weights) < 1e-10
    change = torch.zeros(5, dtype=torch.float64)
    change[jac.norm(dim=1).argmax()] = 1e-3  # along a zero row, it would be none
    # Weights of UPGrad that are too large still fit some projections; below 1 / m they fit none.
    spoiled = {
        "mgda": (weights + change) / (weights + change).sum(),
        "dualproj": weights + change,
        "upgrad": torch.where(change > 0, 0.2 - change, weights),
    }[name]
    assert residual(spoiled) > 1e-8


def test_residual_follows_the_preference():
    preference = double(0.7, 0.2, 0.1)
    _, state = jd.monitored(
        jd.dualproj(preference),
        {
            "right": partial(measures.dual_cone_residual, preference=preference),
            "wrong": measures.dual_cone_residual,
        },
    )(B)
    values = jd.read_measures(state)
    assert values["right"] < 1e-12 < 1e-3 < values["wrong"]


PLAIN = [name for name in METHODS if not name.startswith(("monitored", "grouped"))]


@pytest.mark.parametrize("name", PLAIN)
def test_watching_changes_nothing(name):
    method = METHODS[name]
    m = max(3, method.min_m)
    inner = method.make(m)
    jac, losses = matrix("gaussian", m, 5, seed=3), losses_for(method, m)
    watched = jd.monitored(inner, ROWS if inner.weighting is None else ALL)
    state = start = watched.init(jac, key=key_for(method))
    plain = inner.init(jac, key=key_for(method))
    assert all(not value.any() for value in jd.read_measures(state).values())
    for _ in range(2):
        got, state = watched(jac, state, losses=losses)
        want, plain = inner(jac, plain, losses=losses)
        # What sees the rows has more digits than what sees their Gramian, and CAGrad's ball there.
        assert_trees_close((got, state.inner), (want, plain), rtol=1e-10, atol=1e-12)
        assert_same_layout(state, start)


def worst(seen: jd.Observation) -> torch.Tensor:
    """Return the largest loss: a measure of a user's own."""
    assert seen.losses is not None
    return seen.losses.max()


def test_measures_see_the_losses():
    rule = jd.monitored(jd.mgda("loss"), {"worst": worst})
    _, state = rule(B, losses=double(1.0, 3.0, 2.0))
    close(jd.read_measures(state)["worst"], 3.0)
    _, _, state = jd.grad_and_value(lambda x: B @ x + 1, rule)(None, torch.zeros(3).double())
    close(jd.read_measures(state)["worst"], 1.0)


def nested() -> dict[str, jd.Aggregator]:
    """Return rules that hold a watched one."""
    seen = {"weights": measures.weights, "cosine": measures.cosine_to_mean}
    watched = jd.monitored(jd.gradvac(), seen)
    rows = jd.monitored(jd.graddrop(), {"cosine": measures.cosine_to_mean})
    return {
        "plain": watched,
        "grouped": jd.grouped(watched, jd.by_tensor),
        "dict": jd.grouped({"a": watched, "b": jd.monitored(jd.mgda(), seen)}, jd.by_tensor),
        "rows": jd.grouped(rows, jd.by_tensor),
        "smoothed": jd.smoothed(watched),
        "every": jd.every(watched, 2),
        "twice": jd.monitored(watched, {"norms": measures.row_norms}),
        "whole": jd.monitored(
            jd.grouped(watched, jd.by_tensor), {"whole": measures.cosine_to_mean}
        ),
    }


NESTED = nested()
TREE = {"a": matrix("gaussian", 4, 3, 0), "b": matrix("gaussian", 4, 2, 1)}
SHAPES = {
    "plain": {"weights": (4,), "cosine": ()},
    "grouped": {"weights": (2, 4), "cosine": (2,)},
    "dict": {"weights": (2, 4), "cosine": (2,)},
    "rows": {"cosine": (2,)},
    "smoothed": {"weights": (4,), "cosine": ()},
    "every": {"weights": (4,), "cosine": ()},
    "twice": {"weights": (4,), "cosine": (), "norms": (4,)},
    "whole": {"weights": (2, 4), "cosine": (2,), "whole": ()},
}


def step(rule, state, params):
    """Descend once along the rows of `TREE`."""
    jac = _tree.map(lambda row, x: row * x.cos(), TREE, params)
    grads, state = rule(jac, state)
    return _tree.map(lambda x, g: x - 0.1 * g, params, grads), state


@pytest.mark.parametrize("name", NESTED)
def test_measures_are_read_from_any_depth(name):
    rule = NESTED[name]
    state = rule.init(TREE, key=jd.random.key(0))
    for _ in range(2):
        values = jd.read_measures(state)
        assert {key: tuple(value.shape) for key, value in values.items()} == SHAPES[name]
        _, state = rule(TREE, state)
    assert all(value.any() for value in jd.read_measures(state).values())


@pytest.mark.parametrize("name", NESTED)
def test_watched_steps_are_one_graph(name):
    rule = NESTED[name]
    fast, counter = compiled(lambda state, params: step(rule, state, params))
    eager = got = (
        _tree.map(lambda leaf: leaf[0], TREE),
        rule.init(TREE, key=jd.random.key(0)),
    )
    for _ in range(3):
        eager, got = step(rule, eager[1], eager[0]), fast(got[1], got[0])
        assert_trees_close(got, eager, rtol=1e-7, atol=1e-9)
    assert counter.graphs == 1


@pytest.mark.parametrize("name", NESTED)
def test_watched_rules_can_be_mapped(name):
    rule = NESTED[name]
    models = [_tree.map(lambda leaf, i=i: leaf[i], TREE) for i in range(3)]
    keys = jd.random.split(jd.random.key(0), 3)

    def run(params, key):
        params, state = step(rule, rule.init(TREE, key=key), params)
        _, state = step(rule, state, params)
        return jd.read_measures(state)

    want = _tree.stack([run(*pair) for pair in zip(models, keys, strict=True)])
    assert_trees_close(vmap(run)(_tree.stack(models), keys), want, rtol=1e-7, atol=1e-9)


def test_groups_are_measured_one_by_one():
    seen = {"weights": measures.weights, "cosine": measures.cosine_to_mean}
    _, state = jd.grouped(jd.monitored(jd.upgrad(), seen), jd.by_tensor)(TREE)
    values = jd.read_measures(state)
    for place, name in enumerate("ab"):
        _, own = jd.monitored(jd.upgrad(), seen)(TREE[name])
        assert_trees_close(_tree.map(lambda v, k=place: v[k], values), jd.read_measures(own))


def test_measures_are_read_by_the_names_of_the_losses():
    """One number for each objective, for each pair of them, or for all."""
    losses = {"speed": double(1.0), "comfort": double(2.0, 3.0)}
    rows = double(*range(1, 13)).reshape(3, 4).sin()
    seen = {name: getattr(measures, name) for name in ("weights", "pairwise_cosine", "min_cosine")}
    _, state = jd.monitored(jd.mgda(), seen)(rows)
    plain, named = jd.read_measures(state), jd.read_measures(state, names=losses)
    order = ["comfort.0", "comfort.1", "speed"]
    assert list(named["weights"]) == list(named["pairwise_cosine"]) == order
    assert torch.equal(torch.stack([*named["weights"].values()]), plain["weights"])
    for row, name in zip(plain["pairwise_cosine"], order, strict=True):
        assert torch.equal(torch.stack([*named["pairwise_cosine"][name].values()]), row)
    assert torch.equal(named["min_cosine"], plain["min_cosine"])


def test_every_measures_the_calls_that_are_due():
    rule = jd.every(jd.monitored(jd.mgda(), {"weights": measures.weights}), 2)
    _, first = rule(A, None)
    _, second = rule(B[:2], first)
    assert_trees_close(jd.read_measures(second), jd.read_measures(first))


def test_values_do_not_depend_on_the_route():
    rule = jd.grouped(jd.monitored(jd.upgrad(), ALL), jd.by_tensor)

    def fn(x):
        return TREE["a"] @ x["a"] + TREE["b"] @ x["b"]

    point = {"a": torch.zeros(3).double(), "b": torch.zeros(2).double()}
    want = jd.read_measures(rule(TREE)[1])
    for route in ("jacobian", "product"):
        _, state = jd.grad(fn, rule, route=route)(None, point)
        assert_trees_close(jd.read_measures(state), want, rtol=1e-7, atol=1e-9)


def test_scalarizers_are_watched():
    losses = {"b": double(1.0, 2.0), "a": double(4.0)}
    seen = {"weights": measures.weights, "entropy": measures.entropy, "l": lambda s: s.losses}
    rule = jd.monitored(jd.scalarizers.softmax(), seen)
    loss, state = rule(losses, rule.init(losses))
    want, _ = jd.scalarizers.softmax()(losses)
    assert_trees_close(loss, want)
    vector = double(4.0, 1.0, 2.0)
    weights = torch.func.grad(lambda v: jd.scalarizers.softmax()(v)[0])(vector)
    values = jd.read_measures(state)
    assert_trees_close((values["weights"], values["l"]), (weights, vector))
    close(values["entropy"], _entropy(weights.numpy()))


def test_watched_scalarizers_observe_and_train():
    seen = {"weights": measures.weights}
    inner, rule = jd.scalarizers.famo(), jd.monitored(jd.scalarizers.famo(), seen)

    def fn(x):
        return (x - torch.arange(3).double()).square()

    def run(rule, steps=3):
        x = torch.full((3,), 3.0).double()
        state = jd.init_state(rule, fn, x)
        for _ in range(steps):
            grads, state = jd.grad(fn, rule)(state, x)
            x = x - 0.1 * grads
            state = rule.observe(fn(x), state)
        return x, state

    (x, state), (want, plain) = run(rule), run(inner)
    assert_trees_close((x, state.inner), (want, plain))
    assert jd.read_measures(state)["weights"].sum() > 0
    assert jd.monitored(jd.scalarizers.mean(), seen).observe is None
    fast, counter = compiled(lambda state, x: jd.grad(fn, rule)(state, x))
    start = torch.full((3,), 3.0).double()
    first = jd.init_state(rule, fn, start)
    assert_trees_close(fast(first, start), jd.grad(fn, rule)(first, start))
    assert counter.graphs == 1


def test_what_is_not_returned_is_not_computed():
    def loud(seen):
        return torch.linalg.eigvalsh(seen.gramian)

    rule = jd.monitored(jd.mean(), {"loud": loud})
    graphs = []

    def remember(module, inputs):
        graphs.append(str(module.graph))
        return module.forward

    for outputs in (slice(0, 1), slice(0, 2)):
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=remember)
        torch.compile(lambda jac, o=outputs: rule(jac)[o], fullgraph=True, backend=backend)(A)
    assert ["eigh" in graph for graph in graphs] == [False, True]


SEEN = {"weights": measures.weights}
ERRORS = {
    "no rule": (lambda: jd.monitored(jd.upgrad, SEEN), TypeError, "monitored"),  # pyright: ignore
    "no functions": (
        lambda: jd.monitored(jd.upgrad(), {"weights": 1.0}),  # pyright: ignore
        TypeError,
        "measures",
    ),
    "no weights": (
        lambda: jd.monitored(jd.graddrop(), SEEN).init(A, key=jd.random.key(0)),
        ValueError,
        r"observation\.weights",
    ),
    "no gradients": (
        lambda: jd.monitored(jd.scalarizers.mean(), {"n": measures.row_norms})(double(1.0, 2.0)),
        ValueError,
        r"observation\.gramian",
    ),
    "no measures": (lambda: jd.read_measures(()), ValueError, "hold measures"),
    "one name twice": (
        lambda: jd.read_measures(jd.monitored(jd.monitored(jd.mean(), SEEN), SEEN).init(A)),
        ValueError,
        "two of",
    ),
    "state of another rule": (lambda: jd.monitored(jd.mean(), SEEN)(A, ()), ValueError, "state"),
    "state of other measures": (
        lambda: jd.monitored(jd.mean(), SEEN)(A, jd.monitored(jd.mean(), ALL).init(A)),
        ValueError,
        "measures",
    ),
    "state of another size": (
        lambda: jd.monitored(jd.mean(), SEEN)(B, jd.monitored(jd.mean(), SEEN).init(A)),
        ValueError,
        "weights",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_fault(name):
    call, kind, match = ERRORS[name]
    with pytest.raises(kind, match=match):
        call()
