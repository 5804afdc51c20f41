"""Linearize an objective layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func.differentiate._autocast import as_called
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layerwise import (
    Batch,
    Layers,
    Layout,
    Plan,
    PlanChanged,
    Recorded,
    combine,
    jacobian,
    layers,
    record,
    scout,
)
from torchjd_func.differentiate._linearized import Jacobian, Leaves, Linearized, Seen, split_aux
from torchjd_func.differentiate._mask import masked
from torchjd_func.differentiate._objective import Objective
from torchjd_func.differentiate._pullback import basis, times, unscaled
from torchjd_func.differentiate._pullback import call as invoke
from torchjd_func.differentiate._request import Bound, Request, bind, chosen

PyTree = Any
Use = Any  # a recognised operation, of `_layerwise._watch`
Call = Callable[..., tuple[Any, list[Tensor]]]


class Observed(NamedTuple):
    """One recorded run of an objective."""

    recorded: Recorded
    vector: Tensor  # (m,): the losses, in leaf order
    losses: PyTree  # the losses in the user's structure
    aux: PyTree  # what the objective returned beside its losses
    bound: Bound  # the parameters


def linearize_layers(fn: Objective, request: Request) -> Linearized:
    """Run the objective once and keep what each use of parameters was applied to."""
    recorded, vector, losses, aux, bound = observe(fn, request)
    _check.dependent(bool(recorded.uses or recorded.traced))
    ranks = fn.ranks if isinstance(fn, InstanceWise) else None
    if ranks is not None:
        ranks.check(vector)
    vector, present = masked(vector, _flat_flags(losses, request.present))
    shared = recorded.plan.layout.kind == "shared"
    unit = torch.ones_like(vector) if present is None else present.to(vector.dtype)
    cotangents = basis(vector) if shared else unit
    if request.scale is not None:
        cotangents = times(request.scale, cotangents)
    found = layers(
        recorded, cotangents, lambda: _rows_cotangents(vector, request), len(vector), ranks
    )
    found = in_one_precision(found)
    if present is not None and not shared:
        found = _only(found, present)
    places = tuple(range(len(bound.paths)))

    def pullback(weights: Tensor) -> list[Tensor]:
        """Return the leaves of `J^T weights`."""
        return unscaled(combine(found, weights.unsqueeze(0), (places,)), request.scale)

    def rows() -> list[Tensor]:
        """Return the rows of all leaves."""
        return unscaled([jacobian(found, leaf) for leaf in places], request.scale)

    if ranks is not None:
        vector = losses = ranks.gather(vector)
        present = None if present is None else ranks.gather(present)
    where = None if request.alone else request.where
    return Linearized(
        losses=losses,
        aux=aux,
        vector=vector,
        present=present,
        leaves=Leaves(bound.paths, bound.rebuild),
        jacobian=Jacobian(pullback, rows, found, request.scale),
        seen=None if where is None else Seen(chosen(where, bound.paths)),
    )


def _rows_cotangents(vector: Tensor, request: Request) -> Tensor:
    """Return a unit cotangent for each loss."""
    unit = basis(vector)
    return unit if request.scale is None else times(request.scale, unit)


def _flat_flags(losses: PyTree, present: Any) -> Any:
    """Return which losses there are, in leaf order."""
    return None if present is None else masked(losses, present)[1]


def in_one_precision(found: Layers) -> Layers:
    """Bring what a use was applied to and its cotangent to one precision, as under autocast."""
    pairs = [_widest(*pair) for pair in zip(found.uses, found.cotangents, strict=True)]
    uses, cotangents = [use for use, _ in pairs], [cotangent for _, cotangent in pairs]
    return found._replace(uses=uses, cotangents=cotangents)


def _widest(use: Use, cotangent: Tensor) -> tuple[Use, Tensor]:
    """Return a use and its cotangent in the widest of their precisions."""
    floating = [x.dtype for x in (cotangent, *use.arrays) if x.is_floating_point()]
    if all(dtype == cotangent.dtype for dtype in floating):
        return use, cotangent
    wide = reduce(torch.promote_types, floating)
    arrays = [x.to(wide) if x.is_floating_point() else x for x in use.arrays]
    return use._replace(arrays=arrays), cotangent.to(wide)


def _only(found: Layers, present: Tensor) -> Layers:
    """Take what absent examples give, which may not be a number, out of all rows."""
    cotangents = _present.rows(found.cotangents, present)
    uses = [_only_use(use, found.layout, present) for use in found.uses]
    rows = {leaf: _present.rows(rows, present) for leaf, rows in found.rows.items()}
    return found._replace(cotangents=cotangents, uses=uses, rows=rows)


def _only_use(use: Use, layout: Layout, present: Tensor) -> Use:
    """Take the examples that are absent out of the arguments of one use."""
    axes = (0,) * len(use.arrays) if layout.kind == "vmapped" else use.step.axes
    pairs = zip(use.arrays, axes, strict=True)
    return use._replace(arrays=[_only_array(x, axis, present) for x, axis in pairs])


def _only_array(x: Tensor, axis: int | None, present: Tensor) -> Tensor:
    """Take the examples that are absent out of an array that has an axis for them."""
    if axis is None:
        return x
    each = present.repeat_interleave(x.shape[axis] // len(present))
    mask = each.reshape(-1, *[1] * (x.ndim - axis - 1))
    return torch.where(mask, x, torch.zeros_like(x))


def observe(fn: Objective, request: Request) -> Observed:
    """Run the objective once, watching its parameters."""
    bound = bind(request)
    args = request.args
    layout, examples, batch = _structure(fn, args, _check.argnums(request.argnums, len(args)))
    inner = fn if batch is None else batch.fn
    unpackers: list[Callable[[list[Tensor]], Any]] = []

    def call(leaves: Sequence[Tensor], *example: Any) -> tuple[Tensor, list[Tensor]]:
        """Return losses as one vector (or the loss of one example), and tensors to unpack."""
        given = args if batch is None else batch.fill(args, example)
        with as_called(request.autocast):
            out = invoke(inner, bound.fill(leaves, given), request.kwargs)
        losses, aux = split_aux(out, request.has_aux)
        tensors, unpack = _tree.pack((losses, aux))
        unpackers.append(unpack)
        if batch is not None:
            return losses, tensors
        if isinstance(fn, InstanceWise):
            _check.one_for_each_example(losses)
        return masked(losses, request.present)[0], tensors

    plans = fn.plans if isinstance(fn, InstanceWise) else {}
    inputs = _tree.tensors((args, dict(request.kwargs)))
    recorded = run(call, bound.leaves, layout, examples, inputs, batch, plans)
    losses, aux = unpackers[-1](recorded.aux)
    if isinstance(fn, InstanceWise):
        _check.one_for_each_example(losses)
    return Observed(recorded, _tree.ravel(losses), losses, aux, bound)


def _structure(
    fn: Callable[..., Any], args: tuple[Any, ...], positions: tuple[int, ...]
) -> tuple[Layout, list[Tensor], Batch | None]:
    """Return how the objective treats examples, the tensors that have them, and how to map."""
    rest = [place for place in range(len(args)) if place not in positions]
    found = [x for i in rest for x in _tree.leaves(args[i]) if isinstance(x, Tensor) and x.ndim]
    example = fn.example if isinstance(fn, InstanceWise) else None
    if example is not None:
        dims = example.dims(len(args))
        sizes = [x.shape[dims[i]] for i in rest for x in _tree.leaves(args[i]) if _maps(dims[i], x)]
        if sizes and all(dims[position] is None for position in positions):
            batch = Batch(example.fn, tuple(rest), args, dims, example.randomness)
            return Layout("vmapped", sizes[0]), [], batch
    if isinstance(fn, InstanceWise) and found:
        return Layout("batched", found[0].shape[0]), found, None
    return Layout("shared", 0), [], None


def _maps(dim: Any, x: Any) -> bool:
    """Say whether `x` is mapped over one dimension."""
    return isinstance(dim, int) and isinstance(x, Tensor)


def run(
    call: Call,
    leaves: Sequence[Tensor],
    layout: Layout,
    examples: Sequence[Tensor],
    inputs: Sequence[Tensor],
    batch: Batch | None,
    plans: dict[Any, Plan],
) -> Recorded:
    """Run an objective as planned, or plan first.

    Args:
        call: `(leaves, *example) -> (outputs, aux tensors)`.
        leaves: The parameters.
        layout: How the objective treats examples.
        examples: Tensors that may have one row for each example.
        inputs: All tensors among the arguments.
        batch: What to map over, for an objective of one example.
        plans: What is remembered of earlier runs, by shapes.

    Returns:
        The recorded run.
    """
    key = None if torch.compiler.is_compiling() else _signature(leaves, layout, inputs)
    plan = plans.get(key)
    if plan is None:
        plan = scout(call, leaves, layout, examples, inputs, batch)
    try:
        recorded = record(call, leaves, plan, batch)
    except PlanChanged:
        plan = scout(call, leaves, layout, examples, inputs, batch)
        recorded = record(call, leaves, plan, batch)
    if layout.kind == "batched" and recorded.outputs.shape[0] != layout.size:
        layout = Layout("batched", recorded.outputs.shape[0])  # the first array has no examples
        return run(call, leaves, layout, examples, inputs, batch, plans)
    if key is not None:
        plans[key] = plan
    return recorded


def _signature(leaves: Sequence[Tensor], layout: Layout, inputs: Sequence[Tensor]) -> Any:
    """Return what the plan of an objective depends on, besides its code."""
    return layout, tuple((tuple(x.shape), x.dtype, x.device) for x in (*leaves, *inputs))
