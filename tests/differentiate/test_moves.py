"""Parameters whose entries an operation only moves, and functions of parameters alone."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import torchjd_func as jd
from torchjd_func.differentiate._layerwise import _moves

PARAMS = {"w": (4, 4), "token": (1, 1, 4), "queries": (3, 4), "table": (7, 4)}
MOVED = {
    "repeat": lambda p, x, i: p["token"].repeat(len(x), 1, 1).squeeze(1) * x,
    "repeat behind": lambda p, x, i: p["queries"].unsqueeze(1).repeat(1, len(x), 1).sum(0) * x,
    "repeat in front": lambda p, x, i: (
        p["queries"].repeat(len(x), 1).unflatten(0, (-1, 3))[:, 1] * x
    ),
    "repeat a function": lambda p, x, i: (
        (p["queries"] @ p["w"]).tanh().repeat(len(x), 1, 1)[:, 2] * x
    ),
    "tile": lambda p, x, i: p["queries"].tile(len(x), 1, 1).sum(1) * x,
    "stack": lambda p, x, i: torch.stack([p["queries"]] * len(x)).sum(1) * x,
    "expand behind": lambda p, x, i: p["queries"].unsqueeze(1).expand(-1, len(x), -1).sum(0) * x,
    "expand, then merge": lambda p, x, i: (
        p["queries"].expand(len(x), 3, 4).reshape(-1, 4).unflatten(0, (-1, 3)).prod(1) * x
    ),
    "gather": lambda p, x, i: (
        p["table"].expand(len(x), 7, 4).gather(1, i[:, :1, None].expand(-1, 1, 4))[:, 0] * x
    ),
    "columns": lambda p, x, i: p["table"].t()[:, i[:, 0]].t() * x,
    "take_along_dim": lambda p, x, i: p["table"].take_along_dim(i[:, :1].expand(-1, 4), 0) * x,
    "index": lambda p, x, i: p["table"][i].sum(1) * x,
    "index_select": lambda p, x, i: (
        p["table"].index_select(0, i.flatten()).unflatten(0, (-1, 2))[:, 1] * x
    ),
}
DERIVED = {
    "transposed": lambda p, x, i: x @ p["w"].T,
    "transposed twice": lambda p, x, i: F.linear(x, p["w"].mT) @ p["w"].mT,
    "mish": lambda p, x, i: x @ F.mish(p["w"]),
    "dropout that is off": lambda p, x, i: x @ F.dropout(p["w"], 0.5, training=False),
}


def losses(fn, params, x, i):
    """Return a loss for each example."""
    return (fn(params, x, i).sin() ** 2).sum(-1)


def batch(seed):
    """Return parameters, and a batch with indices."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in PARAMS.items()
    }
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return params, x, torch.randint(7, (5, 2), generator=generator)


@pytest.mark.parametrize("name", [*MOVED, *DERIVED])
def test_no_parameter_takes_a_backward_pass_for_each_loss(name):
    fn = partial(losses, (MOVED | DERIVED)[name])
    objective = jd.instancewise(fn)
    for seed in (0, 1):
        params, x, i = batch(seed)
        expected = jd.gramian(objective, route="jacobian")(params, x, i)
        found = jd.gramian(objective)(params, x, i)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
        grads, _ = jd.grad(objective, jd.constant(weights))((), params, x, i)
        plain = torch.func.grad(lambda p, x=x, i=i, w=weights: fn(p, x, i) @ w)(params)
        torch.testing.assert_close(grads, plain, rtol=1e-12, atol=1e-12)
    text = str(jd.explain_gramian(objective, *batch(0)))
    assert "backward passes" not in text


@pytest.mark.parametrize("name", ["repeat behind", "expand, then merge", "gather", "index"])
def test_compiled_they_take_none_either(name):
    objective = jd.instancewise(partial(losses, MOVED[name]))
    torch._dynamo.reset()
    jd.gramian(objective)(*batch(0))
    found = torch.compile(jd.gramian(objective), fullgraph=True, backend="aot_eager")(*batch(1))
    expected = jd.gramian(objective, route="jacobian")(*batch(1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_attributes_are_told_apart():
    def fn(p, x, shape):
        """Read another attribute in each run, first."""
        weight = p.T if shape is None else p.reshape(tuple(p.shape))
        return (x @ weight).sin().sum(-1)

    objective = jd.instancewise(fn)
    p, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for shape in (None, True, None, True):
        expected = jd.gramian(objective, route="jacobian")(p, x, shape)
        found = jd.gramian(objective)(p, x, shape)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_parameter_that_is_dropped_from_takes_rows():
    objective = jd.instancewise(
        lambda p, x: (x @ F.dropout(p, 0.5, training=True)).square().sum(-1)
    )
    p, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.manual_seed(0)
    expected = jd.gramian(objective, route="jacobian")(p, x)
    torch.manual_seed(0)
    torch.testing.assert_close(jd.gramian(objective)(p, x), expected, rtol=1e-12, atol=1e-12)
    assert "backward passes" in str(jd.explain_gramian(objective, p, x))


P = torch.randn(3, 4, dtype=torch.float64)
VALUES = {
    "relu": (torch.relu, (P,)),
    "abs": (torch.abs, (P,)),
    "round": (torch.round, (P,)),
    "clamp": (torch.clamp, (P, -1e30, 1e30)),
    "clip from below": (torch.clamp, (P, -1e200)),
    "hardtanh": (F.hardtanh, (P, -1e9, 1e9)),
    "threshold": (F.threshold, (P, 1e-200, 0.0)),
    "zeros": (F.pad, (P, (0, 1))),
    "sum": (torch.add, (P, 1e-200)),
    "sort": (lambda p: p.sort(1).values, (P,)),
    "largest": (lambda p: p.topk(2).values, (P,)),
    "float32": (lambda p: p.float(), (P,)),
    "another": (lambda p: torch.maximum(p, P[:1] - 1e5), (P,)),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_looks_at_values_does_not_only_move_them(name):
    func, args = VALUES[name]

    def repeated(p, *rest):
        return func(p, *rest).repeat(5, 1)

    assert not _moves.moves((repeated, args, {}), P, False, 0, 5)
    moved = (lambda p: p.flip(1).roll(1, 0).repeat(5, 1), (P,), {})
    assert _moves.moves(moved, P, False, 0, 5) == _moves.ENTRIES


@pytest.mark.parametrize(
    "func, args, axis, kind",
    [
        (torch.Tensor.__getitem__, (torch.tensor([2, 0, 2]),), 0, _moves.ROWS),
        (torch.index_select, (0, torch.tensor([1, 1, 0])), 0, _moves.ROWS),
        (torch.index_select, (1, torch.tensor([1, 3, 0])), 1, _moves.ENTRIES),
        (torch.take_along_dim, (torch.tensor([[0], [2], [1]]), 1), 0, _moves.ENTRIES),
        (torch.index_fill, (0, torch.tensor([1]), 0.0), 0, ""),
    ],
)
def test_whole_rows_of_a_table_are_told_from_entries(func, args, axis, kind):
    assert _moves.moves((func, (P, *args), {}), P, False, axis, 3) == kind


OPERATORS = {
    "1 - x": lambda x: 1 - x,
    "2 / x": lambda x: 2 / (x.square() + 1),
    "x ** 2": lambda x: x**2,
    "2 ** x": lambda x: 2**x,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_graphs_know_operators_by_the_names_that_they_have_outside(name):
    objective = jd.instancewise(lambda weight, x: OPERATORS[name](x @ weight).sum(-1))
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    gramian = jd.gramian(objective)
    expected = gramian(*given)
    compiled = torch.compile(gramian, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), expected)  # a graph without the plan would warn
