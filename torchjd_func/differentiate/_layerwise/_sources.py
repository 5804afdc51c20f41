"""Tensors made of parameters alone: how to make them again, and how to pull gradients through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import getitem
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func.differentiate._layerwise._functions import attribute_of, named
from torchjd_func.differentiate._layerwise._spelled import spelled

T = TypeVar("T")


class Source(NamedTuple):
    """A value among parameter leaves and constants, or `func(*args, **kwargs)` of sources."""

    leaves: tuple[int, ...]  # the parameter leaves that it depends on
    slot: int  # the place of a value that is not computed, leaves first; -1 for one that is
    func: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    entrywise: bool = True  # its entries are those of one leaf, in some order
    expanded: bool = False  # it stands for its own repetition along the examples


class Place(NamedTuple):
    """Stands for a tensor among the arguments of an operation that is not made of parameters."""

    number: int


def of_leaf(index: int) -> Source:
    """Return the source that is a parameter leaf itself."""
    return Source((index,), index)


def of_constant(slot: int) -> Source:
    """Return the source that is a constant."""
    return Source((), slot)


def derive(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, expanded: bool
) -> Source:
    """Return the source of `func(*args, **kwargs)`, in whose arguments sources stand for tensors.

    A source that `expand` repeats once for each example is described by what is repeated.
    """
    parents = sources_in((args, kwargs))
    leaves = tuple(sorted({leaf for parent in parents for leaf in parent.leaves}))
    if expanded:
        given = args[1:] or tuple(kwargs.values())
        sizes = tuple(given[0]) if isinstance(given[0], (list, tuple)) else given
        return Source(leaves, -1, func, (args[0], 1, *sizes[1:]), {}, False, True)
    if attribute_of(func):
        func, args = getattr, (args[0], attribute_of(func))
    alike = func in ENTRYWISE or (func is getattr and args[1] in _TRANSPOSED)
    entrywise = alike and len(parents) == 1 and parents[0].entrywise
    return Source(leaves, -1, func, args, kwargs, entrywise)


def pick(parent: Source, index: int) -> Source:
    """Return one of several outputs of a source, as of `chunk`."""
    return Source(parent.leaves, -1, getitem, (parent, index), None, False)


def is_reordered(source: Source) -> bool:
    """Say whether a source may have its numbers in another order than the leaf it is made of."""
    if source.func is None:
        return False
    return source.func not in _CASTS or any(map(is_reordered, sources_in(source.args)))


def build(source: Source, values: Sequence[Tensor]) -> Any:
    """Make the tensor again from parameter leaves and constants."""
    if source.func is None:
        return values[source.slot]
    args, kwargs = substitute((source.args, source.kwargs), lambda part: build(part, values))
    return spelled(source.func, True)(*args, **(kwargs or {}))


def pull(source: Source, leaf: int, values: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Pull rows `(e, ...)` of gradients by a source back to one of its leaves."""
    if source.func is None:
        return rows.reshape(-1, *values[leaf].shape)
    alone = source.args and isinstance(source.args[0], Source) and source.args[0].func is None
    if source.expanded and alone and rows[0].numel() == values[leaf].numel():
        return rows.reshape(-1, *values[leaf].shape)

    def make(value: Tensor) -> Tensor:
        return build(source, [value if i == leaf else other for i, other in enumerate(values)])

    made, pullback = torch.func.vjp(make, values[leaf])[:2]
    shaped = rows.reshape(-1, *made.shape).to(made.dtype)
    return vmap(lambda row: pullback(row)[0])(shaped)


def substitute(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """Return arguments with each tensor, source and place replaced."""
    if isinstance(tree, _REPLACED):
        return replace(tree)
    if isinstance(tree, dict):
        return {name: substitute(part, replace) for name, part in tree.items()}
    if not isinstance(tree, (list, tuple)):
        return tree
    parts = []
    for part in tree:
        if isinstance(part, _REPLACED):
            parts.append(replace(part))
        elif isinstance(part, _NESTED):
            parts.append(substitute(part, replace))
        else:
            parts.append(part)
    return parts if isinstance(tree, list) else tuple(parts)


def instances_in(kind: type[T] | tuple[type[T], ...], tree: Any) -> list[T]:
    """Return what is of a kind, or of several, among arguments or outputs, in order."""
    if isinstance(tree, kind):
        return [tree]
    if not isinstance(tree, _NESTED):
        return []
    found: list[T] = []
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, kind):
            found.append(part)
        elif isinstance(part, _NESTED):  # few calls, since a compiler is slow to trace one
            found.extend(instances_in(kind, part))
    return found


def numbers_in(tree: Any) -> tuple[float, ...]:
    """Return the numbers among arguments that plans leave open, but for integers."""
    return tuple(instances_in(float, tree))


tensors_in = partial(instances_in, Tensor)
sources_in = partial(instances_in, Source)
_NESTED = (dict, list, tuple)
_REPLACED = (Tensor, Source, Place)


_TRANSPOSED = ("T", "mT")
_CASTS = named("clone contiguous to float double half bfloat16")
ENTRYWISE = _CASTS | named(
    "t transpose swapaxes swapdims permute movedim moveaxis adjoint reshape view flatten unflatten "
    "squeeze unsqueeze view_as reshape_as alias"
)
