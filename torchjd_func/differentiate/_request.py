"""What a transform asks of an objective, and the leaves that are differentiated for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._shares import Part
from torchjd_func.differentiate._autocast import Autocast
from torchjd_func.differentiate._pullback import replaced

PyTree = Any
Where = Callable[[str], bool]


class Request(NamedTuple):
    """What a transform was made with, and one call of the transformed function."""

    argnums: int | tuple[int, ...] = 0
    has_aux: bool = False
    route: str = "auto"
    chunk_size: int | None = None
    where: Where | None = None  # the leaves that weights come from; `None` for all
    alone: bool = False  # whether these leaves are all that is differentiated
    rows: bool = True  # whether anybody looks at rows, or one combination of them is all
    spans: bool = False  # whether the rule works over processes
    rule: str = ""  # with its options, which are the same on all processes
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    present: Any = None  # which losses there are: `(m,)`, or a tree of bools; `None` for all
    part: Part = Part()  # what this process has of a batch that several have
    autocast: Autocast = ()  # where the transformed function was called
    scale: Tensor | None = None  # a factor of the losses in the backward pass alone


class Bound(NamedTuple):
    """The leaves that are differentiated, and how they are put back."""

    leaves: list[Tensor]
    paths: list[str]
    rebuild: Callable[[Sequence[Any]], PyTree]  # the argument, with None for other leaves
    fill: Callable[..., tuple[Any, ...]]  # leaves (and other arguments) -> all arguments


def bind(request: Request) -> Bound:
    """Return the differentiated leaves."""
    args, argnums = request.args, request.argnums
    positions = _check.argnums(argnums, len(args))
    several = isinstance(argnums, tuple)
    primals = tuple(args[i] for i in positions) if several else args[positions[0]]
    flat, rebuild = _tree.flatten(primals)
    paths = _tree.paths(primals)
    places = range(len(flat))
    if request.alone and request.where is not None:
        places = chosen(request.where, paths)
    kept = [flat[i] for i in places]
    names = [paths[i] for i in places]
    compiling = torch.compiler.is_compiling()  # which writes no numbers that may change (2.13)
    _check.params("the arguments" if compiling else f"argument {argnums}", names, kept)

    def spread(leaves: Sequence[Any], others: Sequence[Any]) -> PyTree:
        return rebuild(replaced(others, places, leaves))

    def fill(leaves: Sequence[Tensor], given: tuple[Any, ...] = args) -> tuple[Any, ...]:
        value = spread(leaves, flat)
        return tuple(replaced(given, positions, value if several else (value,)))

    return Bound(kept, names, lambda leaves: spread(leaves, [None] * len(flat)), fill)


def chosen(where: Where, paths: Sequence[str]) -> tuple[int, ...]:
    """Return the places of the leaves that a predicate of paths names."""
    places = tuple(place for place, path in enumerate(paths) if where(path))
    _check.some_named("where", places, paths)
    return places
