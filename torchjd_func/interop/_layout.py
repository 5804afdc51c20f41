"""The structure of a state as a short text, and the state from it, without a fresh one.

Only the named tuples of the rule itself, dicts, lists and tuples are rebuilt: nothing is imported
or run that a file names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _check

PyTree = Any
Node = Any  # of JSON
KINDS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "list": lambda items: [part for _, part in items],
    "tuple": lambda items: tuple(part for _, part in items),
}


def describe(tree: PyTree, tensors: dict[str, Tensor], path: tuple[str, ...] = ()) -> Node:
    """Return the structure of a state, and collect its tensors by name."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        name = ".".join(path)
        _check.unique_names("state", [*tensors, name])
        tensors[name] = tree.detach()
        return {"tensor": name, "dtype": str(tree.dtype), "shape": list(tree.shape)}
    items = [
        [name, describe(part, tensors, (*path, str(name)))] for name, part in _items(path, tree)
    ]
    return {"kind": type(tree).__name__, "items": items}


def _items(path: tuple[str, ...], tree: PyTree) -> list[tuple[Any, PyTree]]:
    """Return the parts of a state by name."""
    if hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    _check.storable(".".join(path), tree, type(tree).__name__ in KINDS)
    return list(tree.items()) if isinstance(tree, Mapping) else list(enumerate(tree))


def rebuild(node: Node, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> PyTree:
    """Return the state that a structure describes."""
    if node is None:
        return None
    if "tensor" in node:
        tensor = tensors[node["tensor"]]
        _check.saved_tensor(node["tensor"], tensor, str(tensor.dtype), node)
        return tensor.detach()
    items = [(name, rebuild(part, tensors, classes)) for name, part in node["items"]]
    if node["kind"] in KINDS:
        return KINDS[node["kind"]](items)
    kind = classes.get(node["kind"])
    fields = None if kind is None else list(getattr(kind, "_fields", ()))
    _check.saved_class(node["kind"], fields == [name for name, _ in items])
    assert kind is not None
    return kind(*(part for _, part in items))


def names(node: Node) -> Iterator[str]:
    """Yield the names of the tensors of a structure."""
    if node is not None and "tensor" in node:
        yield node["tensor"]
    elif node is not None:
        for _, part in node["items"]:
            yield from names(part)


def state_classes(rule: Any) -> dict[str, type]:
    """Return the named tuples by the side of the functions of a rule, and of rules in it."""
    found: dict[str, type] = {}
    for fn in _functions(rule, set()):
        for value in getattr(fn, "__globals__", {}).values():
            if isinstance(value, type) and hasattr(value, "_fields"):
                found.setdefault(value.__name__, value)
        kind = _check.state_class(fn)
        if kind is not None:  # of two classes of one name, the rule's own
            found[kind.__name__] = kind
    return found


def _functions(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the functions that a rule calls, as far as they are bound to one another."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[Any] = []
    if hasattr(value, "init_fn"):
        parts = [value.init_fn, value.update_fn, getattr(value, "weighting", None)]
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, tuple | list):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif hasattr(value, "__globals__"):
        yield value
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
    for part in parts:
        yield from _functions(part, seen)
