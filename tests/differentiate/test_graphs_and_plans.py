"""Graphs replay plans of what they do, whatever a compiler hides of it, and take rows else."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchjd_func as jd

FIXED = torch.linspace(0.1, 1, 9, dtype=torch.float64).reshape(3, 3)
HELD = nn.Parameter(FIXED.clone())  # not differentiated by the objective
ON = [False]  # what the objectives do is another thing when it is set


def _layer(p, x):
    return torch.tanh(x @ p["w"])


def _held(p, x):
    return F.linear(_layer(p, x), p["w"] if ON[0] else HELD).tanh().sum(-1)


def _transposed(p, x):
    return (_layer(p, x) @ (p["w"] if ON[0] else FIXED).T).square().sum(-1)


def _transposed_of_held(p, x):
    return (_layer(p, x) @ (p["w"] if ON[0] else HELD).T).square().sum(-1)


def _padded(p, x):
    return (_layer(p, x) @ F.pad(p["w"] if ON[0] else FIXED, (0, 1))).square().sum(-1)


def _iterated(p, x):
    h = _layer(p, x)
    for row in p["w"] if ON[0] else FIXED:
        h = torch.tanh(h * row)
    return h.sum(-1)


def _made_of_numbers(p, x):
    other = p["w"].T if ON[0] else torch.ones(3, 3, dtype=torch.float64)
    return (_layer(p, x) @ other).tanh().sum(-1)


def _written(p, x):
    h = torch.tanh(x @ p["w"] * p["v"][0] + p["u"][0])
    out = torch.zeros_like(h)
    out[...] = p["u" if ON[0] else "v"][1]
    return (h * out).sum(-1)


def _within_one_operation(p, x):
    h = torch.tanh(F.linear(x, p["v"]))
    factors = h, p["w"], p["v"] if ON[0] else HELD
    return torch.einsum("...i,ij,jk->...k", *factors).tanh().sum(-1)


def _untied_within_one_operation(p, x):
    how = "bi,ij,jk->bk" if x.ndim == 2 else "i,ij,jk->k"
    return torch.einsum(how, x, p["w"], FIXED if ON[0] else p["w"]).tanh().sum(-1)


def _made_of_activations(p, x):
    m = torch.tanh(F.linear(x, p["v"])).sum(-1, keepdim=True).expand(x.shape) if ON[0] else FIXED[0]
    return (x * (F.tanh(m) * p["w"][0])).tanh().sum(-1)


def _mapped(p, x):
    h = _layer(p, x)
    s = torch.vmap(torch.sin)(p["v"] if ON[0] else HELD)
    return (F.linear(h, p["v"]) + s.sum(0)).sum(-1)


def _longer(p, x):
    out = F.linear(x, p["w"]).tanh().sum(-1)
    if ON[0]:
        out = out * 2
        out += 1.0
    return out


def _of_another_dtype(p, x):
    dtype = torch.float64 if ON[0] else torch.float32
    h = F.linear(x.to(dtype), p["w"].to(dtype)).tanh()
    return F.linear(h, p["v"].to(dtype)).tanh().sum(-1).double()


CHANGING = [
    _held,
    _iterated,
    _longer,
    _made_of_activations,
    _made_of_numbers,
    _mapped,
    _of_another_dtype,
    _padded,
    _transposed,
    _transposed_of_held,
    _untied_within_one_operation,
    _within_one_operation,
    _written,
]


@pytest.fixture
def changing():
    """Let what the objectives do change, once."""
    yield lambda: ON.__setitem__(0, True)
    ON[0] = False


def _objective(losses, layout):
    if layout == "batched":
        return jd.instancewise(losses)
    return jd.per_example(losses, in_dims=(None, 0))


def _arguments():
    torch.manual_seed(0)
    params = {name: torch.rand(3, 3, dtype=torch.float64) for name in "uvw"}
    return params, torch.randn(4, 3, dtype=torch.float64)


def _compiled(objective, **options):
    torch._dynamo.reset()
    gramian = jd.gramian(objective)
    return torch.compile(gramian, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("losses", CHANGING)
@pytest.mark.parametrize("layout", ["batched", "per example"])
def test_what_changed_since_the_plan_has_rows(losses, layout, changing):
    args, objective = _arguments(), _objective(losses, layout)
    jd.gramian(objective)(*args)
    changing()
    expected = jd.gramian(objective, route="jacobian")(*args)
    with pytest.warns(UserWarning, match="something else than was planned"):
        found = _compiled(objective)(*args)
    torch.testing.assert_close(found, expected)


def test_arrays_of_numpy_have_rows_in_graphs():
    args = _arguments()
    objective = jd.instancewise(lambda p, x: (x[:, np.array([0, 2])] @ p["w"][:2]).sum(-1))
    expected = jd.gramian(objective)(*args)
    with pytest.warns(UserWarning, match="something else than was planned"):
        torch.testing.assert_close(_compiled(objective)(*args), expected)


HIDDEN = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "tanh": F.tanh,
    "abs": abs,
    "pad": lambda h: F.pad(h, (1, -1)),
    "a list": lambda h: torch.stack(list(h.unsqueeze(0)))[0],
    "ones": lambda h: h + torch.ones_like(h),
    "vmap": torch.vmap(torch.sin),
    "grad": torch.func.grad(lambda h: h.square().sum()),
    "jvp": lambda h: torch.func.jvp(torch.sin, (h,), (h.cos(),))[1],
    "jacrev": torch.func.jacrev(lambda h: h.square().sum()),
}


@pytest.mark.parametrize("between", HIDDEN)
@pytest.mark.parametrize("layout", ["batched", "per example"])
def test_what_a_compiler_hides_between_uses_keeps_factors(between, layout):
    def losses(p, x):
        return F.linear(HIDDEN[between](F.linear(x, p["w"])), p["v"], p["u"][0]).tanh().sum(-1)

    args, objective = _arguments(), _objective(losses, layout)
    expected = jd.gramian(objective)(*args)
    torch.testing.assert_close(_compiled(objective)(*args), expected)


def _data(h):
    return h.data


def _written_data(h):
    g = h * 1
    g.data.mul_(2.0)
    return g


def _if_traced(h):
    return h * 2 if h.requires_grad else h


def _if_leaf(h):
    return h * 2 if h.is_leaf else h


@pytest.mark.parametrize("between", [_data, _if_leaf, _if_traced, _written_data])
def test_activations_are_traced_in_graphs_as_they_are_without(between):
    def losses(p, x):
        return F.linear(between(F.linear(x, p["w"])), p["v"], p["u"][0]).tanh().sum(-1)

    args, objective = _arguments(), jd.instancewise(losses)
    expected = jd.gramian(objective)(*args)
    torch.testing.assert_close(_compiled(objective)(*args), expected)


@pytest.mark.parametrize("layout", ["batched", "per example"])
def test_graphs_of_any_size_replay_plans(layout):
    args, objective = _arguments(), _objective(_layer_sum, layout)
    expected = jd.gramian(objective)(*args)
    torch.testing.assert_close(_compiled(objective, dynamic=True)(*args), expected)


def _layer_sum(p, x):
    return _layer(p, x).sum(-1)


@pytest.mark.parametrize("layout", ["batched", "per example"])
def test_plans_under_autocast_are_not_for_runs_without(layout):
    def losses(p, x):
        return F.linear(F.linear(x, p["w"]).tanh(), p["v"], p["u"][0]).tanh().sum(-1)

    params, x = _arguments()
    args = {name: value.float() for name, value in params.items()}, x.float()
    objective = _objective(losses, layout)
    with torch.autocast("cpu", torch.bfloat16):
        jd.gramian(objective)(*args)
    expected = jd.gramian(_objective(losses, layout), route="jacobian")(*args)
    torch.testing.assert_close(jd.gramian(objective)(*args), expected)
    torch.testing.assert_close(_compiled(objective)(*args), expected)


def _biased(w, v, rows, x):
    return torch.tanh(F.linear(x, v, w))


def _between_others(w, v, rows, x):
    return torch.tanh(torch.einsum("...i,i,i,ij->...j", x, rows[0], w, v))


def _before_and_after(w, v, rows, x):
    return torch.tanh(torch.einsum("...i,i,ij->...j", x, w, v)) * rows[1]


def _beside_a_product(w, v, rows, x):
    return torch.tanh(F.linear(x, v * rows[0], w))


WAYS = [_before_and_after, _beside_a_product, _between_others, _biased]


@pytest.mark.parametrize("use", WAYS)
@pytest.mark.parametrize("layout", ["batched", "per example"])
def test_graphs_replay_uses_of_what_was_written_to(use, layout):
    """No graph shows that a copy of a parameter was written to, so the plan says it."""

    def losses(params, x):
        v, rows, table = params
        w = rows[0].clone()
        w[0] = 0.3
        h = use(w, v, rows, x)
        return (h + F.embedding((h > 0).long(), table).sum(-1)).sum(-1)

    torch.manual_seed(0)
    params = [torch.rand(size, 3).double() for size in (3, 2, 2)]
    x = torch.randn(4, 3).double()
    objective = _objective(losses, layout)
    expected = jd.gramian(objective, route="jacobian")(params, x)
    torch.testing.assert_close(jd.gramian(objective)(params, x), expected)
    torch.testing.assert_close(_compiled(objective)(params, x), expected)


def test_graphs_that_leave_the_plan_before_other_uses_take_rows():
    first = ["a"]

    def losses(params, x):
        h = torch.tanh(x @ params[first[0]])
        return (h + F.embedding((h > 0).long(), params["c"]).sum(-1)).sum(1)

    torch.manual_seed(0)
    params = {name: torch.rand(3, 3).double() for name in "ab"} | {"c": torch.rand(2, 3).double()}
    x = torch.randn(4, 3).double()
    objective = jd.instancewise(losses)
    jd.gramian(objective)(params, x)
    first[0] = "b"
    with pytest.warns(UserWarning, match="something else than was planned, from matmul on"):
        found = _compiled(objective)(params, x)
    torch.testing.assert_close(found, jd.gramian(objective)(params, x))
