"""Comparisons of pytrees, and a compiler that counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.testing._errors import Fault


class GraphCounter:
    """A compiler backend that runs the captured graph as it is, and counts graphs."""

    def __init__(self) -> None:
        """Start at 0."""
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        """Return the graph as a function."""
        self.graphs += 1
        return module.forward


def compiled(fn: Callable[..., Any]) -> tuple[Callable[..., Any], GraphCounter]:
    """Capture `fn` as one graph; fails at a graph break."""
    torch.compiler.reset()
    counter = GraphCounter()
    return torch.compile(fn, fullgraph=True, backend=counter), counter


def require(condition: bool, got: str, remedy: str | None = None) -> None:
    """Raise unless the condition holds, saying what came instead, and what to do about it."""
    if not condition:
        raise Fault(got, remedy)


def assert_trees_close(
    got: Any,
    want: Any,
    rtol: float = 1e-9,
    atol: float = 1e-12,
    what: str = "results",
    remedy: str | None = None,
) -> None:
    """Compare two pytrees leaf by leaf; not-a-numbers are equal."""
    require(_tree.same_structure(got, want), f"{what} of another structure")
    for a, b in zip(_tree.leaves(got), _tree.leaves(want), strict=True):
        try:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            text = f"{what} that differ: {_numbers(a)} and {_numbers(b)}"
            raise Fault(text, remedy) from error


def assert_same_layout(got: Any, want: Any, what: str = "results") -> None:
    """Check structure, shapes, dtypes and devices."""
    require(_tree.same_structure(got, want), f"{what} of another structure")
    pairs = zip(_tree.leaves(got), _tree.leaves(want), strict=True)
    for after, before in [(_layout(a), _layout(b)) for a, b in pairs]:
        require(after == before, f"{what} of {after} instead of {before}")


def _layout(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"type {type(leaf).__name__}"
    return f"shape {tuple(leaf.shape)}, {leaf.dtype} on {leaf.device}"


def _numbers(leaf: Any) -> str:
    return " ".join(repr(leaf).split())


def clone(tree: Any) -> Any:
    """Copy every tensor of a pytree."""
    return _tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
