"""What several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torchjd_func as jd
from torchjd_func.testing._compare import (
    GraphCounter,
    assert_same_layout,
    assert_trees_close,
    clone,
    compiled,
)
from torchjd_func.testing._matrices import as_matrix, as_tree

__all__ = [
    "GraphCounter",
    "as_matrix",
    "as_tree",
    "assert_differentiable",
    "assert_same_layout",
    "assert_trees_close",
    "clone",
    "compiled",
]


def assert_differentiable(fn: Callable[[Tensor], Tensor], x: Tensor, eps: float = 1e-6) -> None:
    """Compare the gradient that torch.func takes of `fn`, a number, with differences."""
    unit = eps * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    want = torch.stack([(fn(x + step) - fn(x - step)) / (2 * eps) for step in unit])
    torch.testing.assert_close(torch.func.grad(fn)(x).reshape(-1), want, rtol=1e-5, atol=1e-7)


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
