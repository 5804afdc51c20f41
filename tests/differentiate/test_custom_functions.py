"""Custom autograd functions in graphs: their backward counts, or they are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchjd_func as jd

pytestmark = [
    # Dynamo makes an instance of a function that it traces (torch 2.13).
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
    pytest.mark.filterwarnings("ignore:An instance-wise objective is compiled without a plan"),
]


class Rounded(torch.autograd.Function):
    """Signs, with the gradient of what they round."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, reach):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.reach = inputs[1]

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < ctx.reach), None


def rounded(x):
    return Rounded.apply(x, 1.5)


def of_written(w, x):
    hidden = torch.zeros(len(x), 3, dtype=x.dtype)
    hidden[:, 1:] = (x @ w[0])[:, 1:]
    return rounded(hidden) @ w[1]


OBJECTIVES = {
    "of a parameter": lambda w, x: x @ rounded(w[0]) @ w[1],
    "of two": lambda w, x: F.linear(x, rounded(w[0])).tanh() @ rounded(w[1]),
    "of what a parameter made": lambda w, x: rounded(x @ w[0]) @ w[1],
    "of what was written": of_written,
    "of data alone": lambda w, x: rounded(x) @ w[0] @ w[1],
    "without gradients, and with": lambda w, x: x @ rounded(w[0]) * rounded(w[1].detach()).mean(),
}
VERBS = {
    "jac": lambda fn: jd.jac(fn),
    "gramian": lambda fn: jd.gramian(fn),
    "gramian by rows": lambda fn: jd.gramian(fn, route="jacobian"),
    "gramian, instance-wise": lambda fn: jd.gramian(jd.instancewise(fn)),
    "jac by microbatches": lambda fn: jd.jac(jd.accumulate(fn, 2)),
    "one direction": lambda fn: lambda *args: jd.grad(fn, jd.mean())(None, *args)[0],
}


def point():
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 3), (3, 3), (4, 3)
    draws = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return draws[:2], draws[2]


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


CASES = [
    *((name, verb) for name in OBJECTIVES for verb in ("gramian", "gramian, instance-wise")),
    *(("of a parameter", verb) for verb in VERBS),
]


@pytest.mark.parametrize("name, verb", sorted(set(CASES)))
def test_the_backward_of_a_custom_function_counts_in_a_graph(name, verb):
    weights, x = point()
    fn = VERBS[verb](lambda w, x: OBJECTIVES[name](w, x).tanh().sum(1))
    expected = fn(weights, x)
    torch.testing.assert_close(compiled(fn)(weights, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("name", ["of a parameter", "of what a parameter made"])
def test_a_graph_of_examples_refuses_a_custom_function(name, planned):
    weights, x = point()
    objective = jd.per_example(lambda w, x: OBJECTIVES[name](w, x).tanh().sum())
    gramian = jd.gramian(objective, route="auto" if planned else "jacobian")
    if planned:
        gramian(weights, x)
    with pytest.raises(Exception, match="vmap over"):
        compiled(gramian)(weights, x)
