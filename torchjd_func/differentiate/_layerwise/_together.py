"""Leaves that share a product on a device, where a call takes longer than to copy small factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise import _forms
from torchjd_func.differentiate._layerwise._forms import Dense, Form, Outer

# Numbers of a leaf that are copied, and of what is held for the product of several: 4 and 64 MB.
SMALL, MOST = 2**20, 2**24


class Pair(NamedTuple):
    """The rows of a leaf in two runs, or twice those of one."""

    first: Form
    second: Form
    dtype: torch.dtype  # of the sum of products


def together(pairs: Iterable[Pair], like: Tensor) -> Iterable[Pair]:
    """Join small leaves that are alike, if that pays where a tensor is."""
    return join(pairs) if like.is_cuda else pairs


def join(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Join small leaves that are alike: rows, or factors of one shape."""
    waiting: dict[Any, list[Pair]] = {}
    for pair in pairs:
        kinds = [_kind(form) for form in pair[:2]]
        if None in kinds:
            yield pair
            continue
        kind = (*kinds, pair.first is pair.second, pair.dtype)
        waiting.setdefault(kind, []).append(pair)
        if (len(waiting[kind]) + 1) * _forms.held(pair.first, pair.second) > MOST:
            yield _joined(waiting.pop(kind))
    yield from map(_joined, waiting.values())


def _kind(form: Form) -> tuple[Any, ...] | None:
    """Return what is equal of leaves that are joined; nothing for a leaf that stays alone."""
    if isinstance(form, Dense) and form.rows.numel() <= SMALL:
        return len(form.rows), form.rows.dtype
    if isinstance(form, Outer) and form.left.numel() + form.right.numel() <= SMALL:
        return form.left.shape, form.right.shape, form.left.dtype, form.right.dtype
    return None


def _joined(pairs: list[Pair]) -> Pair:
    """Return the rows of several leaves next to each other."""
    if len(pairs) == 1:
        return pairs[0]
    first = _beside([pair.first for pair in pairs])
    same = pairs[0].first is pairs[0].second
    return Pair(first, first if same else _beside([p.second for p in pairs]), pairs[0].dtype)


def _beside(forms: Sequence[Any]) -> Form:
    """Return rows next to each other, or factors in as many groups."""
    if isinstance(forms[0], Dense):
        return Dense(torch.cat([_tree.matrix(form.rows) for form in forms], 1))
    left, right = zip(*((form.left, form.right) for form in forms), strict=True)
    return Outer(_groups(left), _groups(right), (len(forms), *forms[0].shape))


def _groups(factors: Sequence[Tensor]) -> Tensor:
    """Return factors `(e, t, g, q)` as one, with the groups of each in turn."""
    return torch.stack(list(factors), 1).transpose(1, 2).flatten(2, 3)
