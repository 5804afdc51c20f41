"""Rows of examples that are spread over processes: what is exchanged and multiplied of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func._pack import pack
from torchjd_func._shares import same
from torchjd_func.differentiate._layerwise import _forms
from torchjd_func.differentiate._layerwise._forms import Dense, Form

PyTree = Any


class Ranks(NamedTuple):
    """Processes with as many examples each; all examples are counted process by process."""

    size: Callable[[], int]
    rank: Callable[[], int]
    gather: Callable[[Tensor], Tensor]  # (k, ...) -> (size * k, ...)
    total: Callable[[PyTree], PyTree]  # the sum over processes
    lengths: Callable[[list[int], PyTree], list[list[int]]] | None  # what each has, once checked
    kept: Tensor | None = None  # the places of what counts, where batches were filled up
    padded: int = 0  # how many losses each process has then
    whole: bool = False  # whether all that counts is present
    agree: Callable[[PyTree], Callable[[PyTree], PyTree]] | None = None  # as `_handshake.agreed`
    differ: Callable[[dict[str, str]], set[str]] | None = None  # as `_handshake.differing`


def count(m: int, primals: PyTree, ranks: Ranks) -> int:
    """Return how many examples all processes have, of which this one has `m`."""
    if torch.compiler.is_compiling() or ranks.lengths is None:
        return m * ranks.size()
    every = ranks.lengths([m], {"rule": "jd.init_state", **same("parameters", primals)})
    return sum(number for (number,) in every)


def joined(values: Tensor, ranks: Ranks) -> Tensor:
    """Return values `(k, ...)` of the examples of each process, for all that count."""
    every = ranks.gather(values)
    return every if ranks.kept is None else every[ranks.kept]


def own(weights: Tensor, ranks: Ranks) -> Tensor:
    """Return the weights `(g, k)` of the examples of this process, of `(g, m)`."""
    if ranks.kept is not None:
        filled = weights.new_zeros(len(weights), ranks.padded * ranks.size())
        weights = filled.index_copy(1, ranks.kept, weights)
    return weights.chunk(ranks.size(), dim=1)[ranks.rank()]


def stack(products: Tensor, first: Ranks, second: Ranks) -> Tensor:
    """Return the products `(g, k, size * k)` of the rows of each process, `(g, m, m)`."""
    rows = joined(products.transpose(0, 1), first).transpose(0, 1)
    return rows if second.kept is None else rows[:, :, second.kept]


def cross(a: Form, b: Form, ranks: Ranks | None) -> Tensor:
    """Return the inner products of the rows of `a` here and those of `b`, on all processes."""
    if ranks is None:
        return _forms.cross(a, b)
    parts = _of_all(b, ranks)
    if not _forms.inner_is_cheaper(a, parts[0]):
        a = Dense(_forms.dense(a))
    return torch.cat([_forms.cross(a, part) for part in parts], dim=1)


def _of_all(form: Form, ranks: Ranks) -> list[Form]:
    """Return the rows of each process; what travels is factors or rows, whatever is less."""
    e, t, g, q, p = _forms.sizes(form)
    lookup = isinstance(form, _forms.Lookup)
    factors = e * t * (q + 1 if lookup else g * (q + p))
    form = _forms.made(form) if factors < e * g * q * p else Dense(_forms.dense(form))
    tensors, rebuild = pack(form)
    parts = [ranks.gather(x).chunk(ranks.size()) for x in tensors]
    return [rebuild(list(values)) for values in zip(*parts, strict=True)]
