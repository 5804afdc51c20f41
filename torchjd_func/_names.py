"""Options with a number for each objective: as a vector, or by the names of the losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _check, _host, _tree
from torchjd_func._numbers import Named

Vector = Tensor | Named  # what is left of an option once it is checked


def entries(name: str, value: Vector, like: Tensor) -> Tensor:
    """Return one number for each row of `like`, in its dtype and on its device."""
    values = value.values if isinstance(value, Named) else value
    _check.length(name, values, like.shape[0])
    if isinstance(value, Named):
        return value.at(like)
    return _host.to(values, like)


def of_each(tree: Any) -> list[str]:
    """Return the name of each number of `tree`: that of its leaf, and its place in a larger one.

    A tree of strings holds the names themselves.
    """
    return [
        name
        for path, leaf in zip(_tree.paths(tree), _tree.leaves(tree), strict=True)
        for name in _each(path, leaf)
    ]


def _each(path: str, leaf: Any) -> list[str]:
    """Return the name of each number of a leaf."""
    if isinstance(leaf, str):
        return [leaf]
    _check.tensors("names", [path], [leaf])
    if leaf.numel() == 1:
        return [path]
    places = itertools.product(*(range(size) for size in leaf.shape))
    return [".".join(map(str, (path, *place) if path else place)) for place in places]


def vector(rule: Any, losses: Any) -> Tensor:
    """Return losses as a vector; if they have names, options by name have to be theirs."""
    paths, leaves = _tree.paths(losses), _tree.leaves(losses)
    _check.losses(paths, leaves)
    if not isinstance(losses, Tensor):
        check_names(rule, paths)
    return _tree.ravel(leaves)


def check_names(rule: Any, loss_paths: Sequence[str]) -> None:
    """Check that the options of a rule that are given by name name the losses.

    Args:
        rule: A rule, with all that it is made of.
        loss_paths: The names of the losses, in leaf order.
    """
    for option, names in named_options(rule):
        _check.loss_names(option, names, loss_paths)


def named_options(rule: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Return the options of a rule, and of those in it, that are given by name, with the names."""
    return [(option, value.names) for option, value in _walk("", rule)]


def _walk(option: str, value: Any) -> Iterator[tuple[str, Named]]:
    """Visit what the functions of a rule are bound to."""
    if isinstance(value, Named):
        yield from [(option, value)] if value.names else []
    elif isinstance(value, partial):
        for name, bound in [*((option, x) for x in value.args), *value.keywords.items()]:
            yield from _walk(name, bound)
    elif isinstance(value, Mapping | list | tuple):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _walk(option, member)
    elif not isinstance(value, int | float | Tensor) and hasattr(value, "update_fn"):
        yield from _walk(option, value.update_fn)  # what a graph has as a number has no attributes
