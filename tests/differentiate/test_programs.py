"""Programs at random are right or say so, eager and as one graph; `tests/programs.py` runs more."""

import pytest
import torch
from torch.nn import functional as F

import torchjd_func as jd
from tests.programs import by_loops, is_rounding, outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", range(0, 2000, 100))
def test_programs_at_random_are_right(start):
    found = {seed: outcome(seed) for seed in range(start, start + 100)}
    assert not {seed: result for seed, result in found.items() if result.startswith("wrong")}
    counts = list(found.values())
    assert counts.count("invalid") < 30
    assert counts.count("right") > 50


@pytest.mark.parametrize("scale", [1.0, 1e17])
def test_rows_that_are_rounding_alone_prove_nothing(scale):
    def losses(params, x, flag):
        return (scale * (x @ params[0].square()) + flag).sin()

    params, x = [torch.linspace(1, 2, 3, dtype=torch.float64)], torch.ones(2, 3).double()
    expected = [by_loops(losses, params, x, flag) for flag in (0, 1)]
    assert is_rounding(losses, params, x, expected) == (scale > 1)


@pytest.mark.filterwarnings("ignore")
def test_programs_at_random_are_right_in_single_precision():
    found = {seed: outcome(seed, dtype=torch.float32) for seed in range(5000, 5100)}
    assert not {seed: result for seed, result in found.items() if result.startswith("wrong")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(9000, 9016))
def test_compiled_programs_at_random_are_right(seed):
    assert outcome(seed, compiled=True) in ("right", "warned", "invalid")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["init_state", "nothing"])
@pytest.mark.parametrize("seed", [7000006, 9000, 9011])
def test_compiled_programs_are_right_with_and_without_a_plan(seed, first):
    result = outcome(seed, compiled=True, first=first)
    assert result == ("warned" if first == "nothing" else "right")


CONSTANT = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
ROUTES = {
    "another parameter": lambda p, x, k: x @ p[k],
    "a getter of another parameter": lambda p, x, k: x @ p[k].T,
    "a constant, or a getter": lambda p, x, k: F.linear(x, p[0]) @ (p[1].T if k else CONSTANT),
    "a constant, or a parameter": lambda p, x, k: F.linear(x, p[0]) * (p[1] if k else CONSTANT)[0],
    "a bias or none": lambda p, x, k: F.linear(x, p[0], p[1][0] if k else None),
    "rows that are unpacked": lambda p, x, k: x * sum(row.square() for row in p[k]),
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_graph_that_goes_another_way_than_planned_says_so(name):
    params = [torch.randn(3, 3, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(4, 3, dtype=torch.float64)
    objective = jd.instancewise(lambda p, x, k: ROUTES[name](p, x, k).square().sum(1))
    jd.gramian(objective)(params, x, 0)
    torch._dynamo.reset()
    compiled = torch.compile(jd.gramian(objective), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="compiled without a plan"):
        found = compiled(params, x, 1)
    expected = jd.gramian(objective, route="jacobian")(params, x, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_graph_knows_which_functions_of_parameters_have_no_derivative():
    params, x = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def loss(p, x):
        sizes, places = p[0].sort(dim=1)
        chosen = torch.where(p[1] > 0, p[1], 2 * p[1]).gather(1, places)
        return (x @ chosen).tanh() @ (sizes * p[1].detach())[0]

    objective = jd.instancewise(loss)
    expected = jd.gramian(objective, route="jacobian")(params, x)
    torch.testing.assert_close(jd.gramian(objective)(params, x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(jd.gramian(objective), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, x), expected, rtol=1e-10, atol=1e-12)
