"""An objective at one point, layer by layer: Gramians, rows and pullbacks without a Jacobian.

One forward pass records what the uses of parameters were applied to; one backward pass, through the
activations alone, yields the gradient by each use's output. All else is products of these two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._precision import in_one_precision
from torchjd_func.differentiate._layerwise import _forms, _ranks
from torchjd_func.differentiate._layerwise._forms import Dense, Form
from torchjd_func.differentiate._layerwise._functions import name_of
from torchjd_func.differentiate._layerwise._pieces import (
    Piece,
    form_of,
    index,
    spread,
    spread_arrays,
)
from torchjd_func.differentiate._layerwise._plan import Layout
from torchjd_func.differentiate._layerwise._ranks import Ranks
from torchjd_func.differentiate._layerwise._record import Recorded
from torchjd_func.differentiate._layerwise._sources import is_reordered, pull
from torchjd_func.differentiate._layerwise._together import Pair, together
from torchjd_func.differentiate._layerwise._trace import Use
from torchjd_func.differentiate._pullback import pull_rows

Groups = Sequence[Sequence[int]]


class Layers(NamedTuple):
    """What each use of parameters gives to the rows of the Jacobian."""

    layout: Layout
    uses: list[Use]
    arrays: list[list[Tensor]]  # of each use, `(e, ...)`, or `(1, ...)` that all share
    cotangents: list[Tensor]  # of each use, `(e, ...)`
    values: list[Tensor]  # parameter leaves, then constants
    pieces: dict[int, list[Piece]]  # the uses of each leaf
    rows: dict[int, Tensor]  # of leaves without a rule, `(e, *shape)`
    size: int  # how many rows there are
    each: int = 1  # how many losses an example has
    ranks: Ranks | None = None  # which processes have the rows of other examples
    apart: frozenset[int] = frozenset()  # leaves that processes use in different ways


def layers(
    recorded: Recorded,
    cotangents: Any,
    basis: Any,
    m: int,
    ranks: Ranks | None = None,
    chunk_size: int | None = None,
) -> Layers:
    """Pull cotangents back to the uses; leaves whose rows autograd computes need a whole basis.

    Args:
        recorded: A run of the objective.
        cotangents: Of all losses at once, or `(m, ...)` of an objective without examples.
        basis: `() -> (m, ...)`, one cotangent for each loss; `None` if `cotangents` are such.
        m: How many losses there are.
        ranks: Which processes have the rows of other examples.
        chunk_size: How many losses share a backward pass to the leaves without rules.

    Returns:
        What was pulled back.
    """
    plan, pull = recorded.plan, recorded.pull
    each = plan.layout.losses_of_one(m)
    if plan.layout.kind == "shared":
        pulled = pull_rows(lambda row: pull(row, True, plan.opaque), cotangents, chunk_size)
        by_uses, by_leaves = pulled
    else:
        by_uses = _pull_uses(recorded, cotangents, each)
        by_leaves = []
        if plan.opaque and basis is not None:
            by_leaves = pull_rows(lambda row: pull(row, False, plan.opaque)[1], basis(), chunk_size)
    rows = dict(zip(plan.opaque, by_leaves, strict=False))
    pieces = index(recorded.uses, frozenset(plan.opaque))
    pairs = [_widest(*pair) for pair in zip(recorded.uses, by_uses, strict=True)]
    uses, cotangents = [use for use, _ in pairs], [cotangent for _, cotangent in pairs]
    arrays = [spread_arrays(use, plan.layout, each) for use in uses]
    return Layers(
        plan.layout, uses, arrays, cotangents, recorded.values, pieces, rows, m, each, ranks
    )


def _widest(use: Use, cotangent: Tensor) -> tuple[Use, Tensor]:
    """Return a use and its cotangent in the widest of their precisions, as autocast mixes them."""
    arrays, (cotangent,) = in_one_precision(use.arrays, [cotangent])
    return use if arrays is use.arrays else use._replace(arrays=arrays), cotangent


def _pull_uses(recorded: Recorded, cotangents: Tensor, each: int) -> list[Tensor]:
    """Return the gradients by the outputs of uses, one row for each loss of each example."""
    plan, pull = recorded.plan, recorded.pull
    if plan.layout.kind != "batched":
        return list(pull(cotangents, True, ())[0])
    rows = [cotangents]
    if each > 1:  # the first losses of all examples, then the second, and so on
        rows = torch.diag_embed(cotangents.reshape(-1, each), dim1=0, dim2=2).flatten(1).unbind()
    pulled = [pull(row, True, ())[0] for row in rows]
    pairs = zip(zip(*pulled, strict=True), recorded.uses, strict=True)
    by_loss = [[spread(x, use.step.axis, plan.layout) for x in xs] for xs, use in pairs]
    # By example, then by loss
    return [xs[0] if each == 1 else torch.stack(xs, 1).flatten(0, 1) for xs in by_loss]


def gramians(found: Layers, groups: Groups) -> Tensor:
    """Return the Gramian of each group of leaves, `(g, m, m)`."""
    products = cross_gramians(found, found, groups)
    return products if found.ranks is None else (products + products.mT) / 2


def cross_gramians(a: Layers, b: Layers, groups: Groups) -> Tensor:
    """Return the products of the rows of each group of leaves, `(g, m_a, m_b)`."""
    first = _alike(a, groups)
    a, b = first, first if a is b else _alike(b, groups)
    products = torch.stack([_cross_group(a, b, leaves) for leaves in groups])
    return (
        products if a.ranks is None or b.ranks is None else _ranks.stack(products, a.ranks, b.ranks)
    )


def combine(found: Layers, weights: Tensor, groups: Groups) -> list[Tensor]:
    """Return `J^T weights`, leaf by leaf, with the weights `(g, m)` of each leaf's group."""
    group_of = {leaf: g for g, leaves in enumerate(groups) for leaf in leaves}
    if found.ranks is not None:
        weights = _ranks.own(weights, found.ranks)
    grads = [_combine_leaf(found, weights[group_of[leaf]], leaf) for leaf in sorted(group_of)]
    return grads if found.ranks is None else found.ranks.total(grads)


def jacobian(found: Layers, leaf: int) -> Tensor:
    """Return the rows of one leaf, `(m, *shape)`."""
    _check.rows_are_here(found.ranks is None)
    value = found.values[leaf]
    rows = _rows(found, leaf)
    if rows is None:
        return value.new_zeros(found.size, *value.shape)
    return rows.to(value.dtype)


def leaf_form(found: Layers, leaf: int, *, ordered: bool = False) -> Form | None:
    """Return the rows of one leaf, as factors if they have any; in another order, if allowed."""
    pieces = found.pieces.get(leaf, [])
    moved = any(is_reordered(piece.source) for piece in pieces)
    entrywise = all(piece.source.entrywise for piece in pieces)
    if leaf in found.apart or leaf in found.rows or (ordered and moved) or not entrywise:
        rows = _rows(found, leaf)
        if rows is None and leaf in found.apart:
            rows = jacobian(found._replace(ranks=None), leaf)
        return None if rows is None else Dense(rows)
    forms = [form_of(found, piece, found.cotangents[piece.use]) for piece in pieces]
    if len(forms) < 2:
        return forms[0] if forms else None
    merged = None if moved else _forms.merged(forms)
    if isinstance(merged, _forms.Mixed) and found.ranks is not None:
        merged = None
    return Dense(_rows_of(found, leaf, forms)) if merged is None else merged


def rule_names(found: Layers, leaf: int) -> str:
    """Return the operations that use a leaf."""
    names = [name_of(found.uses[piece.use].step.func) for piece in found.pieces.get(leaf, [])]
    unique = list(dict.fromkeys(names))
    return ", ".join(
        name if names.count(name) == 1 else f"{name} x{names.count(name)}" for name in unique
    )


def leaf_costs(found: Layers, leaf: int) -> tuple[str, int]:
    """Return how the share of a leaf is contracted, and the bytes that this holds."""
    form = leaf_form(found, leaf)
    assert form is not None
    held = _forms.held(form, form) * _tree.real(found.values[leaf]).element_size()
    return "factors" if _forms.inner_is_cheaper(form, form) else "rows", held


def _alike(found: Layers, groups: Groups) -> Layers:
    """Let all processes exchange the same: rows of leaves that they use in different ways."""
    ranks = found.ranks
    if ranks is None or ranks.agree is None or ranks.differ is None:
        return found
    order = [leaf for leaves in groups for leaf in leaves]
    kinds = {
        f"operations.{leaf} {tuple(found.values[leaf].shape)}": _kind(found, leaf) for leaf in order
    }
    if torch.compiler.is_compiling():
        gather, after = ranks.gather, ranks.agree({"params": found.values[0], **kinds})
        return found._replace(ranks=ranks._replace(gather=lambda x: gather(after(x))))
    different = ranks.differ(kinds)
    apart = [leaf for leaf, path in zip(order, kinds, strict=True) if path in different]
    return found._replace(apart=frozenset(apart))


def _kind(found: Layers, leaf: int) -> str:
    """Say how a leaf is used, and in which form its rows are."""
    if leaf in found.rows:
        return "rows"
    pieces = found.pieces.get(leaf, [])
    names = ", ".join([name_of(found.uses[piece.use].step.func) for piece in pieces]) or "nothing"
    if torch.compiler.is_compiling():  # whose shapes may be symbols
        return names
    forms = [form_of(found, piece, found.cotangents[piece.use]) for piece in pieces]
    return " ".join([names, *map(_forms.outline, forms)])


def _cross_group(a: Layers, b: Layers, leaves: Sequence[int]) -> Tensor:
    """Add the products of the rows of each leaf of a group."""
    total: Tensor | None = None
    for first, second, dtype in together(_pairs(a, b, leaves), a.values[0]):
        products = _ranks.cross(first, second, b.ranks).to(dtype)
        total = products if total is None else total + products
    return _nothing(a, b) if total is None else total


def _pairs(a: Layers, b: Layers, leaves: Sequence[int]) -> Iterator[Pair]:
    """Yield the rows of each leaf of a group, one leaf's at a time."""
    for leaf in leaves:
        first = leaf_form(a, leaf, ordered=a is not b or a.ranks is not None)
        second = first if a is b else leaf_form(b, leaf, ordered=True)
        if first is not None and second is not None:
            yield Pair(first, second, _tree.accumulation_dtype(a.values[leaf].dtype))


def _combine_leaf(found: Layers, weights: Tensor, leaf: int) -> Tensor:
    """Return the weighted sum of the rows of one leaf."""
    value = found.values[leaf]
    parts = []
    for piece in found.pieces.get(leaf, []):
        part = _forms.total(form_of(found, piece, _weigh(found, piece.use, weights)))
        parts.append(pull(piece.source, leaf, found.values, part.unsqueeze(0))[0])
    if leaf in found.rows:
        parts.append(_tree.weighted_sum(found.rows[leaf], weights))
    return sum(parts[1:], parts[0]).to(value.dtype) if parts else torch.zeros_like(value)


def _rows(found: Layers, leaf: int) -> Tensor | None:
    """Return the rows of one leaf, `(m, *shape)`."""
    pieces = found.pieces.get(leaf, [])
    forms = [form_of(found, piece, found.cotangents[piece.use]) for piece in pieces]
    rows = [_rows_of(found, leaf, forms)] if forms else []
    rows += [found.rows[leaf]] if leaf in found.rows else []
    return sum(rows[1:], rows[0]) if rows else None


def _rows_of(found: Layers, leaf: int, forms: Sequence[Form]) -> Tensor:
    """Add the rows of all uses of a leaf."""
    pairs = zip(found.pieces[leaf], forms, strict=True)
    rows = [pull(p.source, leaf, found.values, _forms.dense(form)) for p, form in pairs]
    return sum(rows[1:], rows[0])


def _weigh(found: Layers, use: int, weights: Tensor) -> Tensor:
    """Return the cotangent of one use, weighted; summed, where examples share the arguments."""
    cotangent = found.cotangents[use]
    weights = weights.to(cotangent.dtype)
    if found.layout.kind == "shared":
        return torch.tensordot(weights, cotangent, dims=1).unsqueeze(0)
    return cotangent * _tree.per_row(weights, cotangent)


def _nothing(a: Layers, b: Layers) -> Tensor:
    """Return the products of rows that are zero."""
    world = 1 if b.ranks is None else b.ranks.size()
    return _tree.real(a.values[0]).new_zeros(a.size, world * b.size)
