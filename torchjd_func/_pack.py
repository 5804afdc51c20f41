"""Take the tensors out of what a function returns, and put others in their places.

What is tracked by `torch.func` has to leave it by its own way out, or stays a tensor of a transform
that is over. Besides pytrees, objects are opened: dataclasses, outputs of models, caches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _tree

PyTree = Any
Packed = tuple[list[Tensor], Callable[[list[Tensor]], Any]]


def pack(tree: PyTree, within: tuple[int, ...] = ()) -> Packed:
    """Return the tensors of `tree`, and the function that puts them back among all else.

    Args:
        tree: A pytree, whose leaves may be objects that hold tensors; these are copied.
        within: The objects that hold the tree, which may hold themselves.

    Returns:
        The tensors, and what takes as many.
    """
    flat, rebuild = _tree.flatten(tree)
    packed = [_leaf(leaf, within) for leaf in flat]

    def unpack(tensors: list[Tensor]) -> PyTree:
        """Put tensors in their places."""
        values, start = [], 0
        for held, restore in packed:
            values.append(restore(tensors[start : start + len(held)]))
            start += len(held)
        return rebuild(values)

    return [x for held, _ in packed for x in held], unpack


def _leaf(leaf: Any, within: tuple[int, ...]) -> Packed:
    """Return the tensors of a leaf, and what restores it."""
    if isinstance(leaf, Tensor):
        return [leaf], lambda tensors: tensors[0]
    items, attributes = _opened(leaf)
    if not (items or attributes) or id(leaf) in within:
        return [], lambda _: leaf
    tensors, unpack = pack((items, attributes), (*within, id(leaf)))
    return tensors, partial(_restored, leaf, unpack) if tensors else lambda _: leaf


def _opened(leaf: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return the items and the attributes of an object that only holds values."""
    if callable(leaf):  # functions, types, modules
        return {}, {}
    names = getattr(leaf, "__dataclass_fields__", {})
    attributes = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    items = dict(leaf) if isinstance(leaf, Mapping) else {}
    return items, attributes | getattr(leaf, "__dict__", {})


def _restored(leaf: Any, unpack: Callable[[list[Tensor]], Any], tensors: list[Tensor]) -> Any:
    """Return a copy of an object that holds other tensors."""
    items, attributes = unpack(tensors)
    other = copy.copy(leaf)
    for name, value in items.items():
        other[name] = value
    for name, value in attributes.items():
        object.__setattr__(other, name, value)  # frozen ones too
    return other
