"""Every method is captured as one graph, once, and gives what it gives eager."""

import pytest
import torch

import torchjd_func as jd
from tests.helpers import assert_trees_close, compiled
from tests.matrices import matrix
from tests.registry import METHODS, fresh, losses_for


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_are_one_graph(name):
    method = METHODS[name]
    m = max(3, method.min_m)
    jac = matrix("gaussian", m, 5, seed=4)
    aggregator, state = fresh(method, jac, m)
    offset = losses_for(method, m)
    target = torch.ones(m, dtype=jac.dtype) if offset is None else offset

    def step(state, x):
        grads, losses, state = jd.grad_and_value(lambda x: jac @ x + target, aggregator)(state, x)
        return x - 1e-3 * grads, losses, state

    fast, counter = compiled(step)
    x = torch.zeros(5, dtype=jac.dtype)
    eager = compiled_out = (x, target, state)
    for _ in range(3):
        eager = step(eager[2], eager[0])
        compiled_out = fast(compiled_out[2], compiled_out[0])
        assert_trees_close(compiled_out, eager)
    assert counter.graphs == 1


def test_hyper_parameters_as_tensors_do_not_recompile():
    jac = matrix("gaussian", 3, 5)
    fast, counter = compiled(lambda b: jd.upgrad(b)(jac)[0])
    for preference in torch.eye(3, dtype=torch.float64) + 0.1:
        torch.testing.assert_close(fast(preference), jd.upgrad(preference)(jac)[0])
    assert counter.graphs == 1


def test_inductor_agrees_with_eager():
    jac = matrix("gaussian", 4, 6)
    torch._dynamo.reset()
    fast = torch.compile(lambda jac: jd.upgrad()(jac)[0], fullgraph=True)
    torch.testing.assert_close(fast(jac), jd.upgrad()(jac)[0])
