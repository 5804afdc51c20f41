"""What several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torchjd_func as jd
from torchjd_func import _tree


class GraphCounter:
    """A compiler backend that runs the captured graph as it is, and counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


def compiled(fn: Callable) -> tuple[Callable, GraphCounter]:
    """Capture `fn` as one graph; fails at a graph break."""
    torch._dynamo.reset()
    counter = GraphCounter()
    return torch.compile(fn, fullgraph=True, backend=counter), counter


def assert_trees_close(got, want, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Compare two pytrees leaf by leaf."""
    assert _tree.same_structure(got, want)
    for a, b in zip(_tree.leaves(got), _tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def assert_same_layout(got, want) -> None:
    """Check structure, shapes, dtypes and devices."""
    assert _tree.same_structure(got, want)
    for a, b in zip(_tree.leaves(got), _tree.leaves(want), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def as_tree(matrix: Tensor) -> dict:
    """Cut the columns of a matrix into a nested pytree, in leaf order, not insertion order."""
    m, n = matrix.shape
    half = n // 2
    return {"z": [matrix[:, half:]], "a": (matrix[:, :half].reshape(m, half, 1), None)}


def as_matrix(tree: dict) -> Tensor:
    """Undo `as_tree`, for a tree with or without the leading dimension."""
    first, second = tree["a"][0], tree["z"][0]
    return torch.cat([first.reshape(*second.shape[:-1], -1), second], dim=-1)


def assert_differentiable(fn: Callable[[Tensor], Tensor], x: Tensor, eps: float = 1e-6) -> None:
    """Compare the gradient that torch.func takes of `fn`, a number, with differences."""
    unit = eps * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    want = torch.stack([(fn(x + step) - fn(x - step)) / (2 * eps) for step in unit])
    torch.testing.assert_close(torch.func.grad(fn)(x).reshape(-1), want, rtol=1e-5, atol=1e-7)


def clone(tree):
    """Copy every tensor of a pytree."""
    return _tree.map(lambda leaf: leaf.clone(), tree)


def weights_of(rule: jd.Aggregator, gramian: Tensor) -> Tensor:
    """Return the weights of a method that needs the Gramian alone."""
    assert rule.weighting is not None
    return rule.weighting(gramian)[0]


def vector_of(aggregator, jac, seed: int = 0) -> Tensor:
    """Aggregate once, from a fresh state."""
    return aggregator(jac, aggregator.init(jac, key=jd.random.key(seed)))[0]


def weigh(aggregator, jac: Tensor, state) -> tuple[Tensor, Any]:
    """Weigh the rows of a matrix once."""
    return aggregator.weighting(jac @ jac.mT, state)


def row_weights(aggregator, jac: Tensor, seed: int = 0) -> Tensor:
    """Weigh once, from a fresh state."""
    return weigh(aggregator, jac, aggregator.init(jac, key=jd.random.key(seed)))[0]


def assert_numbers(got: Tensor, want, tol: float = 1e-7) -> None:
    """Compare with known numbers."""
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def close(got: Tensor, want, atol: float = 1e-7) -> None:
    """Compare with numbers rounded to eight digits."""
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=0, atol=atol)


def double(*values) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def weighting(rule: jd.Aggregator) -> jd.Weighting:
    """Return the weighting of a rule that has one."""
    assert rule.weighting is not None
    return rule.weighting
