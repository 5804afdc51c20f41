"""Rows of examples that are spread over processes: what is exchanged and multiplied of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise import _forms
from torchjd_func.differentiate._layerwise._forms import Dense, Form

PyTree = Any


class Ranks(NamedTuple):
    """Processes with as many examples each; all examples are counted rank by rank."""

    size: Callable[[], int]
    rank: Callable[[], int]
    gather: Callable[[Tensor], Tensor]  # (k, ...) -> (size * k, ...)
    total: Callable[[PyTree], PyTree]  # the sum over ranks
    check: Callable[[Tensor], None]  # that all have as many losses


def own(weights: Tensor, ranks: Ranks) -> Tensor:
    """Return the weights `(g, k)` of the examples of this rank, of `(g, size * k)`."""
    return weights.chunk(ranks.size(), dim=1)[ranks.rank()]


def stack(products: Tensor, ranks: Ranks) -> Tensor:
    """Return the products `(g, k, m)` of the rows of each rank, `(g, size * k, m)`."""
    return ranks.gather(products.transpose(0, 1)).transpose(0, 1)


def cross(a: Form, b: Form, ranks: Ranks | None) -> Tensor:
    """Return the inner products of the rows of `a` here and those of `b`, on all ranks if any."""
    if ranks is None:
        return _forms.cross(a, b)
    parts = _of_all(b, ranks)
    if not _forms.inner_is_cheaper(a, parts[0]):
        a = Dense(_forms.dense(a))
    return torch.cat([_forms.cross(a, part) for part in parts], dim=1)


def _of_all(form: Form, ranks: Ranks) -> list[Form]:
    """Return the rows of each rank; what travels is factors or rows, whatever is less."""
    e, t, g, q, p = _forms.sizes(form)
    lookup = isinstance(form, _forms.Lookup)
    factors = e * t * (q + 1 if lookup else g * (q + p))
    form = _forms.made(form) if factors < e * g * q * p else Dense(_forms.dense(form))
    parts = {
        name: ranks.gather(x).chunk(ranks.size())
        for name, x in form._asdict().items()
        if isinstance(x, Tensor)
    }
    found = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    return [form._replace(**values) for values in found]
