"""The parameters of recorded operations one by one, and the rows of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise import _local, _moves, _rules
from torchjd_func.differentiate._layerwise._forms import Arguments, Dense, Form, Lookup
from torchjd_func.differentiate._layerwise._plan import Layout
from torchjd_func.differentiate._layerwise._rule import Rule, bind
from torchjd_func.differentiate._layerwise._sources import Place, Source, build, sources_in
from torchjd_func.differentiate._layerwise._trace import Use

if TYPE_CHECKING:
    from torchjd_func.differentiate._layerwise._layers import Layers


class Argument(NamedTuple):
    """Which argument of a rule a parameter is."""

    rule: Rule
    name: str
    given: Arguments  # all of them


class Piece(NamedTuple):
    """One parameter of one use."""

    use: int
    source: Source
    occurrence: int  # which of the sources among the arguments
    argument: Argument | None = None  # of the rule of the use, if it has one


def index(uses: Sequence[Use], opaque: frozenset[int]) -> dict[int, list[Piece]]:
    """Return the uses of each leaf that has rules."""
    found: dict[int, list[Piece]] = {}
    for place, use in enumerate(uses):
        for piece in _pieces(place, use):
            for leaf in frozenset(piece.source.leaves) - opaque:
                found.setdefault(leaf, []).append(piece)
    return found


def _pieces(place: int, use: Use) -> list[Piece]:
    """Return the parameters of one use."""
    rule = None if use.step.moves else _rules.rule_of(use.step.func)
    if rule is None:
        sources = sources_in((use.args, use.kwargs))
        sources = sources[:1] if use.step.moves else sources
        return [Piece(place, source, number) for number, source in enumerate(sources)]
    given = bind(rule, use.args, use.kwargs)
    named = [(name, part) for name, part in given.items() if isinstance(part, Source)]
    return [
        Piece(place, part, number, Argument(rule, name, given))
        for number, (name, part) in enumerate(named)
    ]


def form_of(found: Layers, piece: Piece, cotangent: Tensor) -> Form:
    """Return the rows of one parameter of one use."""
    use = found.uses[piece.use]
    if use.step.moves:
        return _moved(found, piece, cotangent)
    arrays = found.arrays[piece.use]
    if piece.argument is None:
        given = (use.args, use.kwargs)
        return _local.rows(use.step.func, given, arrays, cotangent, piece.occurrence, found.values)
    rule, own, given = piece.argument
    arguments = dict(given)
    for name, part in given.items():
        if isinstance(part, Place):
            x = arrays[part.number]
            arguments[name] = x if name in rule.batched else x[0]
    shape = tuple(build(piece.source, found.values).shape)
    return rule.forms[own](arguments, cotangent, shape)


def spread_arrays(use: Use, layout: Layout, each: int) -> list[Tensor]:
    """Return the arrays of a use with a first dimension for the losses, or of size 1."""
    pairs = zip(use.arrays, use.step.axes, strict=True)
    return [_repeated(spread(x, axis, layout), each, axis) for x, axis in pairs]


def _moved(found: Layers, piece: Piece, cotangent: Tensor) -> Form:
    """Return the rows of a parameter whose entries a use only moves."""
    use = found.uses[piece.use]
    shape = tuple(build(piece.source, found.values).shape)
    whole = use.step.moves == _moves.ROWS
    numbers = _moves.numbers((shape[0], 1) if whole else shape, cotangent.device)
    if piece.source.expanded:
        numbers = numbers.expand(found.layout.size, *shape[1:])
    origins = _moves.origins((use.step.func, use.args, use.kwargs), use.arrays, numbers)
    axis = use.step.axis
    each = _repeated(spread(origins, axis, found.layout), found.each, axis).flatten(1)
    if whole:
        return Lookup(each, cotangent.reshape(*each.shape, shape[1]), shape)
    return Dense(_moves.rows(each, cotangent.flatten(1), shape))


def spread(x: Tensor, axis: int | None, layout: Layout) -> Tensor:
    """Return an array with a first dimension for the examples, of size 1 where all share it."""
    if layout.kind == "vmapped":
        return x
    if layout.kind == "shared" or axis is None:
        return x.unsqueeze(0)
    if axis == 0 and x.shape[0] == layout.size:  # most, and in one call
        return x.unsqueeze(1)
    return torch.unflatten(x, axis, (layout.size, -1)).movedim(axis, 0)


def _repeated(x: Tensor, each: int, axis: int | None) -> Tensor:
    """Return an array once for each loss of an example; what all share stays."""
    return x if each == 1 or axis is None else x.repeat_interleave(each, 0)
