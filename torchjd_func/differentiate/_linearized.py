"""An objective at one point: its losses, and the linear map from weights to gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._shares import Part, order
from torchjd_func._types import Aggregator, Processes
from torchjd_func.differentiate._layerwise import Layers

PyTree = Any
Groups = _tree.Groups
Contraction = Callable[[Groups], tuple[Tensor, Callable[[Tensor], PyTree]]]


class Leaves(NamedTuple):
    """The parameters of which there are rows."""

    paths: Sequence[str]
    rebuild: Callable[[Sequence[Any]], PyTree]  # leaves -> the pytree


class Jacobian(NamedTuple):
    """The rows of the leaves, in the ways that routes ask for them."""

    pullback: Callable[[Tensor], list[Tensor]]  # (m,) -> leaves of J^T weights
    rows: Callable[[], list[Tensor]]  # the leaves, (m, ...)
    layers: Layers | None = None  # what layer-by-layer routes recorded
    scale: Tensor | None = None  # how many times too large that is
    known: bool = False  # whether the rows are there already


class Seen(NamedTuple):
    """What weights come from, where that is not the rows of all leaves."""

    places: tuple[int, ...] = ()  # the leaves that count
    rows: list[Tensor] | None = None  # or rows that are known, (m, ...)


class Heads(NamedTuple):
    """The gradients of what some losses have alone."""

    rows: dict[str, PyTree]  # of the losses of each head, (k, ...); None of an absent head
    counts: tuple[int, ...]  # the k of each head, in the order of the sorted names
    weighted: bool  # whether they follow the weighted losses, or the plain ones


class Shards(NamedTuple):
    """Leaves of which each process has a part."""

    contract: Callable[[Contraction, Groups], tuple[Tensor, Callable[[Tensor], PyTree]]]
    contract_seen: Callable[[list[Tensor]], Tensor]  # rows that weights come from -> Gramian
    by_rows: Callable[[Aggregator], Callable[..., tuple[PyTree, Any]]]  # the rule, on placed rows


class Linearized(NamedTuple):
    """An objective at one point."""

    losses: PyTree  # in the user's structure
    aux: PyTree  # what the objective returned beside its losses
    vector: Tensor  # (m,): the losses, in leaf order; zeros for those that are absent
    present: Tensor | None  # (m,) bool
    leaves: Leaves
    jacobian: Jacobian
    seen: Seen | None = None  # `None`: the rows of all leaves
    heads: Heads | None = None
    shards: Shards | None = None
    part: Part = Part()  # for a rule that works over processes


def rows_of(linear: Linearized) -> list[Tensor]:
    """Return the leaves of the Jacobian, `(m, ...)`, zeros for absent losses."""
    rows = linear.jacobian.rows()
    return rows if linear.present is None else _present.rows(rows, linear.present)


def value(linear: Linearized, has_aux: bool) -> Any:
    """Return what `*_and_value` transforms return last."""
    return (linear.losses, linear.aux) if has_aux else linear.losses


def counting(linear: Linearized, part: Part) -> Linearized:
    """Return gradients that are zero without examples, where they may not be numbers."""
    part, size = part._replace(losses=order(linear.losses)), part.size
    linear = linear._replace(part=part)
    if size is None or (not isinstance(size, Tensor) and size > 0):
        return linear
    some = torch.as_tensor(size, device=linear.vector.device) > 0
    pull, heads = linear.jacobian.pullback, linear.heads

    def only(tree: PyTree) -> PyTree:
        return _tree.map(lambda leaf: torch.where(some, leaf, 0), tree)

    return linear._replace(
        jacobian=linear.jacobian._replace(pullback=lambda weights: only(pull(weights))),
        heads=None if heads is None else heads._replace(rows=only(heads.rows)),
    )


def assemble(
    linear: Linearized,
    grads: PyTree,
    weights: Tensor | None = None,
    processes: Processes | None = None,
) -> PyTree:
    """Return the gradients of the argument: those of the leaves, and of heads if there are any."""
    heads = linear.heads
    if heads is None:
        return grads
    if processes is None:
        return grads, _combine_heads(heads, weights)
    if not heads.weighted and (linear.present is not None or linear.part.size is not None):
        heads, weights = (
            heads._replace(weighted=True),
            processes.factors(linear.vector, linear.present),
        )
    return grads, processes.average(_combine_heads(heads, weights))


def _combine_heads(heads: Heads, weights: Tensor | None) -> dict[str, PyTree]:
    """Return the gradient of each head."""
    if not heads.weighted:
        return {
            name: _tree.map(lambda leaf: leaf.sum(0), rows) for name, rows in heads.rows.items()
        }
    parts = _check.head_weights(weights).split(heads.counts)
    pairs = zip(sorted(heads.rows), parts, strict=True)
    return {name: _tree.weighted_sum(heads.rows[name], part) for name, part in pairs}


def split_aux(out: Any, has_aux: bool, *, some: bool = True) -> tuple[PyTree, PyTree]:
    """Separate the losses, `some` at least, from the auxiliary output, `()` if there is none."""
    losses, aux = _check.aux_pair(out) if has_aux else (out, ())
    _check.losses(_tree.paths(losses), _tree.leaves(losses), some)
    return losses, aux
