"""The parameters of modules, of trees of modules, and of trees of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torchjd_func import _check, _tree
from torchjd_func._functionalize import opened

PyTree = Any


def trainable(target: PyTree) -> PyTree:
    """Return the parameters that require a gradient, `None` in the place of all others.

    A module becomes a dict by name; what stands in two places is listed once, in the first.
    """
    known: set[int] = set()

    def kept(path: str, param: Any) -> Tensor | None:
        """Return a parameter that is new and trained."""
        _check.leaf_parameter("target", path, param)
        if not param.requires_grad or id(param) in known:
            return None
        known.add(id(param))
        return param

    nodes, rebuild = _tree.flatten(target)
    places = zip(_tree.paths(target), nodes, strict=True)
    tree = rebuild([_named(path, node, kept) for path, node in places])
    _check.trainable(_tree.leaves(tree))
    return tree


def frozen(target: PyTree) -> Iterator[Tensor]:
    """Yield the parameters that require no gradient."""
    for node in _tree.leaves(target):
        params = node.parameters() if isinstance(node, nn.Module) else [node]
        yield from (param for param in params if not param.requires_grad)


def listed(target: Any) -> PyTree:
    """Return a target that can be read twice, such as that of `model.parameters()`."""
    return tuple(target) if isinstance(target, Iterator) else target


def _named(path: str, node: Any, kept: Any) -> Any:
    """Return the parameters of a module by name, or the one parameter."""
    if not isinstance(node, nn.Module):
        return kept(path, node)
    _check.local(path, node.modules())
    start = f"{path}." if path else ""
    return {name: kept(start + name, param) for name, param in node.named_parameters()}


def shared_part(target: PyTree, tree: PyTree) -> PyTree:
    """Return the part that holds them all: of `(trunk, heads)` without heads, that of `trunk`."""
    below, parts = _children(target), _children(tree)
    full = [name for name, part in (parts or {}).items() if _tree.leaves(part)]
    if below is None or parts is None or len(full) != 1 or isinstance(below[full[0]], Tensor):
        return tree
    return shared_part(below[full[0]], parts[full[0]])


def pairs(target: PyTree, grads: PyTree, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, parameter and gradient; `None` for all of a part that has none."""
    start = f"{path}." if path else ""
    if isinstance(target, nn.ModuleDict | nn.ModuleList) and not _by_name(target, grads):
        target = opened(target)
    below = _children(target)
    if isinstance(target, nn.Module):
        params = dict(target.named_parameters(remove_duplicate=False))
        chosen = dict.fromkeys(params) if grads is None else grads
        _check.grads_by_name(chosen, params)
        yield from ((start + name, params[name], grad) for name, grad in chosen.items())
    elif below is not None:
        parts = dict.fromkeys(below) if grads is None else _children(grads)
        same = parts is not None and parts.keys() == below.keys()
        _check.grads_structure(grads, target, same)
        for name, part in below.items():
            yield from pairs(part, (parts or {})[name], f"{start}{name}")
    elif target is not None:
        yield path, target, grads


def _by_name(target: nn.Module, grads: PyTree) -> bool:
    """Say whether gradients have the names of the parameters of a module."""
    names = {name for name, _ in target.named_parameters(remove_duplicate=False)}
    return isinstance(grads, Mapping) and names.issuperset(grads)


def _children(node: PyTree) -> dict[Any, PyTree] | None:
    """Return the parts of a container by name; `None` of a leaf."""
    if isinstance(node, Mapping):
        return dict(node)
    return dict(enumerate(node)) if isinstance(node, tuple | list) else None
