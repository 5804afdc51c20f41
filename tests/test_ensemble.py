"""Many models in one program against the same models one after another."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_trees_close, clone, close, compiled, double
from torchjd_func import _tree

UNFIT: Any = (1.5,)
SIZES = {"first": (6, 4), "second": (3, 6)}


def make_params(key: Tensor) -> dict:
    """Draw the parameters of a small network with a branch for nothing."""
    keys = jd.random.split(key, len(SIZES))
    pairs = zip(SIZES.items(), keys, strict=True)
    drawn = {n: 0.5 * jd.random.normal(k, s, dtype=torch.float64) for (n, s), k in pairs}
    return {**drawn, "unused": None}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a batch of inputs and targets."""
    first, second = jd.random.split(jd.random.key(seed))
    inputs = jd.random.normal(first, (8, 4), dtype=torch.float64)
    return inputs, jd.random.normal(second, (8, 3), dtype=torch.float64)


def losses_of(params: dict, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss for each of three outputs."""
    hidden = torch.tanh(inputs @ params["first"].mT)
    return (hidden @ params["second"].mT - targets).square().mean(0)


def step(preference: Tensor, lr: Tensor, params: dict, state, inputs: Tensor, targets: Tensor):
    """Train one model for one step; rule and step size are its own."""
    rule = jd.smoothed(jd.upgrad(preference), 0.5)
    grads, losses, state = jd.grad_and_value(losses_of, rule)(state, params, inputs, targets)
    params = _tree.map(lambda x, d: x - lr * d, params, grads)
    return params, state, losses


PREFERENCES = double([0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3])
RATES = double(0.1, 0.05, 0.2, 0.1)


def start() -> tuple[dict, tuple]:
    """Return four models and their states."""
    params = jd.ensemble.init(make_params, jd.random.key(3), 4)
    rule = jd.smoothed(jd.upgrad(), 0.5)
    states = [
        jd.init_state(rule, losses_of, member, *data()) for member in jd.ensemble.unstack(params)
    ]
    return params, jd.ensemble.stack(states)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: compiled(fn)[0]], ids=["", "compiled"])
def test_preferences_in_one_program_equal_separate_runs(wrap, chunk_size):
    many = wrap(jd.ensemble.each(step, shared=(4, 5), chunk_size=chunk_size))
    params, states = start()
    runs = list(zip(jd.ensemble.unstack(params), jd.ensemble.unstack(states), strict=True))
    losses = torch.zeros(4, 3)
    for seed in range(5):
        params, states, losses = many(PREFERENCES, RATES, params, states, *data(seed))
    want = losses
    for i, (member, state) in enumerate(runs):
        for seed in range(5):
            member, state, want = step(PREFERENCES[i], RATES[i], member, state, *data(seed))
        got = (jd.ensemble.unstack(params)[i], jd.ensemble.unstack(states)[i], losses[i])
        assert_trees_close(got, (member, state, want), rtol=0, atol=1e-10)
    assert losses.std(0).min() > 1e-3


def test_the_program_is_compiled_once_and_trains():
    fast, counter = compiled(jd.ensemble.each(step, shared=(4, 5)))
    params, states = start()
    seen = []
    for _ in range(100):
        params, states, losses = fast(PREFERENCES, RATES, params, states, *data())
        seen.append(losses)
    assert counter.graphs == 1
    assert (seen[-1].mean(1) < 0.7 * seen[0].mean(1)).all()


def test_seeds_differ_and_are_those_of_the_split_key():
    params = jd.ensemble.init(make_params, jd.random.key(3), 4)
    keys = jd.random.split(jd.random.key(3), 4)
    assert_trees_close(params, jd.ensemble.stack([make_params(key) for key in keys]))
    assert len({float(x) for x in params["first"][:, 0, 0]}) == 4
    repeated = jd.ensemble.init(lambda key: {"w": torch.ones(2)}, jd.random.key(0), 3)
    assert_trees_close(repeated, {"w": torch.ones(3, 2)})


def test_random_rules_draw_from_the_key_of_each_model():
    rule, jac = jd.rlw(), torch.eye(3, dtype=torch.float64)
    keys = jd.random.split(jd.random.key(1), 5)
    states = jd.ensemble.init(lambda key: rule.init(jac, key=key), jd.random.key(1), 5)
    got, _ = jd.ensemble.each(rule, shared=0)(jac, states)
    want = [rule(jac, rule.init(jac, key=key))[0] for key in keys]
    assert_trees_close(got, torch.stack(want))
    assert len(set(got[:, 0].tolist())) == 5


def test_stack_and_unstack_undo_each_other_and_nothing_is_changed():
    params = jd.ensemble.init(make_params, jd.random.key(3), 4)
    before = clone(params)
    assert_trees_close(jd.ensemble.stack(jd.ensemble.unstack(params)), params, rtol=0, atol=0)
    jd.ensemble.each(lambda x: _tree.map(torch.sin, x), chunk_size=2)(params)
    assert_trees_close(params, before, rtol=0, atol=0)


def test_structures_of_arguments_and_results():
    shared = {"flag": "sum", "scale": torch.tensor(2.0), "n": 3}

    def fn(given, tree, nothing):
        assert nothing is None
        assert given["flag"] == "sum"
        return {"a": (tree["x"].sum() * given["scale"] * given["n"], None), "b": []}

    got = jd.ensemble.each(fn, shared=-3)(shared, {"x": torch.ones(2, 4)}, None)
    assert got["b"] == []
    assert got["a"][1] is None
    assert got["a"][0].tolist() == [24.0, 24.0]


def test_arguments_by_name_are_mapped_or_shared():
    def objective(x, *, scale, shift, fn="sum"):
        assert fn == "sum"
        return {"a": (scale * x).square().sum(), "b": (x - shift["by"]).square().sum()}

    step, x = jd.grad_and_value(objective, jd.upgrad()), double([1.0, 2.0], [3.0, -1.0])
    scale, shift = double(0.5, 2.0), {"by": double(1.0, 2.0, 3.0)[:2]}
    options = {"fn": "sum", "present": {"a": True, "b": False}}
    many = jd.ensemble.each(step, shared=(0, "shift", *options))
    for wrap in (lambda fn: fn, lambda fn: compiled(fn)[0]):
        got = wrap(many)(None, x, scale=scale, shift=shift, **options)
        members = [step(None, x[i], scale=scale[i], shift=shift, **options) for i in range(2)]
        assert_trees_close(got, jd.ensemble.stack(members))


@pytest.mark.parametrize(("chunk_size", "calls"), [(None, 1), (2, 3), (5, 1), (9, 1)])
def test_so_many_models_are_computed_at_a_time(chunk_size, calls):
    seen = []

    def fn(x):
        seen.append(x.shape)
        return 2 * x

    close(jd.ensemble.each(fn, chunk_size=chunk_size)(torch.ones(5, 3)), torch.full((5, 3), 2.0))
    assert seen == calls * [(3,)]


def test_dropout_is_drawn_as_it_is_said():
    def step(params, x):
        def fit(params, x):
            return torch.nn.functional.dropout(x @ params["w"], 0.5).square().mean(0)

        return jd.grad(fit, jd.upgrad())(None, params, x)[0]

    params, x = {"w": torch.ones(4, 16, 2)}, torch.ones(8, 16)
    with pytest.raises(ValueError, match="randomness='different'"):
        jd.ensemble.each(step, shared=1)(params, x)
    for randomness, alike in (("same", True), ("different", False)):
        torch.manual_seed(0)
        grads = jd.ensemble.each(step, shared=1, randomness=randomness)(params, x)["w"]
        assert torch.equal(grads[0], grads[1]) == alike


def test_ensembles_of_ensembles():
    x = torch.arange(6.0).reshape(2, 3)
    twice = jd.ensemble.each(jd.ensemble.each(torch.sin, chunk_size=2))
    assert_trees_close(twice(x), x.sin())
    assert_trees_close(vmap(jd.ensemble.each(torch.sin))(x), x.sin())


def test_a_set_rule_moves_an_ensemble():
    params = jd.ensemble.init(make_params, jd.random.key(3), 4)
    rule = jd.sets.hypervolume_gradient(double(9.0, 9.0, 9.0))
    measure = jd.ensemble.each(jd.jac_and_value(losses_of), shared=(1, 2))

    def step(params, inputs, targets):
        jacs, losses = measure(params, inputs, targets)
        moves, _ = rule(jacs, losses=losses)
        return _tree.map(lambda x, d: x - 0.1 * d, params, moves), losses

    fast, _ = compiled(step)
    volumes, same = [], params
    for _ in range(30):
        params, losses = fast(params, *data())
        same, _ = step(same, *data())
        volumes.append(jd.metrics.hypervolume(losses, double(9.0, 9.0, 9.0)))
    assert_trees_close(params, same, atol=1e-10)
    assert volumes[-1] > volumes[0] + 1


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: jd.ensemble.stack([]), ValueError, "hold at least one model"),
        (lambda: jd.ensemble.stack([{"a": 1.0}]), TypeError, "hold tensors only"),
        (lambda: jd.ensemble.stack([{"a": torch.ones(1)}, {}]), ValueError, "one structure"),
        (lambda: jd.ensemble.stack([torch.ones(1), torch.ones(2)]), ValueError, "same shapes"),
        (lambda: jd.ensemble.unstack({}), ValueError, "be given a stacked tensor"),
        (
            lambda: jd.ensemble.unstack({"a": torch.ones(1), "b": torch.ones(2)}),
            ValueError,
            "at 'b'",
        ),
        (lambda: jd.ensemble.each(torch.sin)(torch.tensor(1.0)), ValueError, "leading dimension"),
        (lambda: jd.ensemble.each(torch.sin)(1.0), ValueError, "leading dimension"),
        (lambda: jd.ensemble.each(torch.sin, chunk_size=0), ValueError, "`chunk_size`"),
        (lambda: jd.ensemble.each(torch.add, shared=2)(*2 * [torch.ones(1)]), ValueError, "shared"),
        (lambda: jd.ensemble.each(torch.add, *UNFIT)(torch.ones(1)), TypeError, "shared"),
        (lambda: jd.ensemble.each(torch.add, "x")(torch.ones(1)), ValueError, "keyword arguments"),
        (
            lambda: jd.ensemble.each(torch.add)(torch.ones(1), other=1.0),
            ValueError,
            "at 'other'.*`shared`",
        ),
        (lambda: jd.ensemble.init(make_params, torch.ones(2), 3), ValueError, "`key` must"),
        (lambda: jd.ensemble.init(make_params, jd.random.key(0), 0), ValueError, "`k` must"),
    ],
)
def test_what_does_not_fit_is_an_error(call, kind, match):
    with pytest.raises(kind, match=match):
        call()
