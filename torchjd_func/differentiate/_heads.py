"""Heads on shared features: their losses, and the gradients by features and by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func.differentiate._autocast import Autocast, as_called
from torchjd_func.differentiate._mask import all_absent, masked
from torchjd_func.differentiate._pullback import (
    basis,
    call,
    enlarged,
    pull_rows,
    reached,
    unscaled,
    vjp_aux,
)
from torchjd_func.differentiate._request import Request

PyTree = Any


class Pulled(NamedTuple):
    """What heads make of the features, all of it constants of derivatives."""

    losses: dict[str, PyTree]
    vector: Tensor  # (m,)
    present: Tensor | None  # (m,) bool
    cotangents: PyTree  # the gradients by the features, (m, ...)
    rows: dict[str, PyTree]  # by the parameters of each head, (k, ...)
    counts: tuple[int, ...]


def pull_heads(
    heads: Mapping[str, Callable[..., Any]],
    params: Mapping[str, PyTree],
    z: PyTree,
    batch: Any,
    kwargs: Mapping[str, Any],
    request: Request,
) -> Pulled:
    """Pull unit cotangents of the losses of each head back, to it and to the features."""
    by_name = isinstance(request.present, Mapping)
    if by_name:
        _check.names("present", request.present, heads)
    found: dict[str, _Head] = {}
    for name in sorted(heads):
        flags = request.present[name] if by_name else None
        head = partial(_call_head, heads[name], batch, kwargs, flags, request.autocast)
        found[name] = (
            _skip_head(params[name], z, flags, request.spans)
            if all_absent(flags)
            else _pull_head(head, params[name], z, request)
        )
    by_features = {name: head.by_features for name, head in found.items()}
    by_own = {name: head.by_own for name, head in found.items()}
    dependent = [by_features[name] or by_own[name] for name in found]
    _check.dependent(any(dependent) or all_absent(request.present))
    if request.present is None:
        _check.each_dependent(list(found), dependent)
        _check.each_trains(by_features, by_own)
    losses = {name: head.losses for name, head in found.items()}
    vector = torch.cat([head.vector for head in found.values()])
    cotangents = _tree.cat([head.cotangents for head in found.values()])
    rows = {name: head.rows for name, head in found.items()}
    counts = tuple(len(head.vector) for head in found.values())
    present = None if by_name else masked(losses, request.present)[1]
    if by_name:
        present = torch.cat([head.present for head in found.values()])
    if present is not None:
        vector = torch.where(present, vector, 0)
        cotangents = _present.rows(cotangents, present)
        parts = zip(rows, present.split(counts), strict=True)
        rows = {name: _present.rows(rows[name], part) for name, part in parts}
    return Pulled(losses, vector, present, cotangents, rows, counts)


class _Head(NamedTuple):
    """What one head makes of the features."""

    losses: PyTree
    vector: Tensor  # (k,)
    present: Tensor  # (k,) bool
    cotangents: PyTree  # the gradients by the features, (k, ...)
    rows: PyTree  # by its own parameters, (k, ...)
    by_features: bool  # whether its losses depend on some feature
    by_own: bool  # whether they depend on some parameter of its own, if it has any


def _call_head(
    head: Callable[..., Any],
    batch: Any,
    kwargs: Mapping[str, Any],
    flags: Any,
    autocast: Autocast,
    given: Any,
) -> tuple[Tensor, Any]:
    """Return the losses of a head, as one vector, and what else is to be known of them."""
    params, z = given
    with as_called(autocast):
        losses = call(head, (params, z, batch), kwargs)
    _check.losses(_tree.paths(losses), _tree.leaves(losses))
    vector, present = masked(losses, flags)
    present = torch.ones_like(vector, dtype=torch.bool) if present is None else present
    return vector, (losses, present, *_dependent(vector, params, z))


def _dependent(vector: Tensor, params: PyTree, z: PyTree) -> tuple[bool, bool]:
    """Say whether losses depend on features, and on parameters; in a graph, on either."""
    own, features = _tree.leaves(params), _tree.leaves(z)
    if torch.compiler.is_compiling() or not vector.requires_grad:
        return vector.requires_grad, vector.requires_grad
    seen = reached([vector], [*features, *own])
    by_own = not own or max(seen, default=-1) >= len(features)
    return min(seen, default=len(features)) < len(features), by_own


def _pull_head(
    head: Callable[[Any], tuple[Tensor, Any]], params: PyTree, z: PyTree, request: Request
) -> _Head:
    """Run a head, and pull unit cotangents of its losses back."""
    vector, pull, (losses, present, by_features, by_own) = vjp_aux(head, (params, z))
    unit = enlarged(basis(vector), request.scale)
    rows, cotangents = pull_rows(pull, unit, 1 if len(vector) == 1 else request.chunk_size)
    rows = unscaled(rows, request.scale)
    return _Head(losses, vector, present, cotangents, rows, by_features, by_own)


def _skip_head(params: PyTree, z: PyTree, flags: Any, elsewhere: bool) -> _Head:
    """Leave a head out that is absent, or on other processes: its losses are not a number."""
    like = _tree.leaves(z)[0]
    count, missing = len(_tree.leaves(flags)), like.new_full((), torch.nan)
    missing = missing.real if missing.is_complex() else missing
    return _Head(
        losses=_tree.map(lambda _: missing, flags),
        vector=missing.new_zeros(count),
        present=torch.zeros(count, dtype=torch.bool, device=like.device),
        cotangents=_tree.map(lambda leaf: leaf.new_zeros(count, *leaf.shape), z),
        rows=_tree.map(
            lambda leaf: _tree.placeholder(leaf, (count, *leaf.shape)) if elsewhere else None,
            params,
        ),
        by_features=False,
        by_own=False,
    )
