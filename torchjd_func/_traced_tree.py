"""Pytrees in what torch.compile traces, where optree takes a quarter of the time (torch 2.13).

Containers of other kinds than these are left to optree.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
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
        return _alike(a, b)
    except LookupError:
        return None


def paths(tree: PyTree) -> list[tuple[Any, ...]] | None:
    """Return where each leaf is, or `None` if that is not known here."""
    try:
        return _paths(tree, ())
    except LookupError:
        return None


def _paths(node: PyTree, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return where the leaves of a node are, which is at a path itself."""
    kind, names, parts = _opened(node)
    if kind is Tensor:
        return [path]
    entries = names if kind is dict else range(len(parts))
    below = [_paths(part, (*path, entry)) for entry, part in zip(entries, parts, strict=True)]
    return [leaf for leaves in below for leaf in leaves]


def _alike(a: PyTree, b: PyTree) -> bool:
    """Compare nodes part by part; versions of torch before 2.13 do not compare dicts in graphs."""
    (kind, names, parts), (other, others, counterparts) = _opened(a), _opened(b)
    if kind is not other or names != others or len(parts) != len(counterparts):
        return False
    return all([_alike(x, y) for x, y in zip(parts, counterparts, strict=True)])


def _numbered(node: PyTree, leaves: list[Any]) -> PyTree:
    """Append the leaves of a node to a list, and return the node with their places instead."""
    kind, names, parts = _opened(node)
    if kind is Tensor:
        leaves.append(node)
        return len(leaves) - 1
    if kind is NoneType:
        return None
    places = [_numbered(part, leaves) for part in parts]
    if kind is dict:
        named = dict(zip(names, places, strict=True))
        return {name: named[name] for name in node}
    return kind(places) if kind in (list, tuple) else kind(*places)


def _opened(node: PyTree) -> tuple[type, list[str], list[Any]]:
    """Return the kind of a node (that of leaves is `Tensor`), the names of its parts, and these."""
    kind = type(node)
    if isinstance(node, LEAVES) or node is None:
        return NoneType if node is None else Tensor, [], []
    if kind is dict and all([isinstance(name, str) for name in node]):
        names = sorted(node)
        return dict, names, [node[name] for name in names]
    if kind in (list, tuple) or (isinstance(node, tuple) and hasattr(node, "_fields")):
        return kind, [], list(node)
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
