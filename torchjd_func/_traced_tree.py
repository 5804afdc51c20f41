"""Pytrees in what torch.compile traces, where optree takes a quarter of the time (torch 2.13).

Containers of other kinds than these are left to optree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

PyTree = Any
LEAVES = (Tensor, float, int, str)


def flatten(tree: PyTree) -> tuple[list[Any], Callable[[Any], PyTree]] | None:
    """Return the leaves of `tree` and the function that puts such leaves back, or `None`."""
    leaves: list[Any] = []
    try:
        places = _numbered(tree, leaves)
    except LookupError:
        return None
    return leaves, lambda values: _filled(places, list(values))


def same_structure(a: PyTree, b: PyTree) -> bool | None:
    """Say whether two trees differ in their leaves alone; `None` if that is not known here."""
    try:
        return _numbered(a, []) == _numbered(b, [])
    except LookupError:
        return None


def _numbered(node: PyTree, leaves: list[Any]) -> PyTree:
    """Append the leaves of a node to a list, and return the node with their places instead."""
    if isinstance(node, LEAVES):
        leaves.append(node)
        return len(leaves) - 1
    if node is None:
        return None
    kind = type(node)
    if kind is dict and all([isinstance(name, str) for name in node]):
        parts = {name: _numbered(node[name], leaves) for name in sorted(node)}
        return {name: parts[name] for name in node}
    if kind in (list, tuple):
        return kind([_numbered(child, leaves) for child in node])
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return kind(*[_numbered(child, leaves) for child in node])
    raise LookupError


def _filled(node: PyTree, values: list[Any]) -> PyTree:
    """Return what `_numbered` did, with values in their places."""
    if isinstance(node, int):
        return values[node]
    if node is None:
        return None
    kind = type(node)
    if kind is dict:
        return {name: _filled(child, values) for name, child in node.items()}
    parts = [_filled(child, values) for child in node]
    return kind(parts) if kind in (list, tuple) else kind(*parts)
