"""Linearize an objective layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._layerwise import (
    Batch,
    Layout,
    Plan,
    PlanChanged,
    Recorded,
    combine,
    layers,
    record,
    scout,
)
from torchjd_func.differentiate._objectives import InstanceWise
from torchjd_func.differentiate._pullback import (
    Linearized,
    as_they_are,
    as_vector,
    basis,
    bind,
    split_aux,
)

PyTree = Any
Call = Callable[..., tuple[Any, list[Tensor]]]


class Observed(NamedTuple):
    """One recorded run of an objective."""

    recorded: Recorded
    vector: Tensor  # (m,): the losses, in leaf order
    losses: PyTree  # the losses in the user's structure
    aux: PyTree  # what the objective returned beside its losses


def linearize_layers(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Run the objective once and keep what each use of parameters was applied to."""
    recorded, vector, losses, aux = observe(fn, args, argnums, has_aux)
    primals, _ = bind(fn, args, argnums)
    _, rebuild = _tree.flatten(primals)
    ranks = fn.ranks if isinstance(fn, InstanceWise) else None
    if ranks is not None:
        ranks.check(vector)
    shared = recorded.plan.layout.kind == "shared"
    cotangents = basis(vector) if shared else torch.ones_like(vector)
    found = layers(recorded, cotangents, partial(basis, vector), vector.shape[0], ranks)
    paths = _tree.paths(primals)
    whole = (tuple(range(len(paths))),)

    def pullback(weights: Tensor) -> list[Tensor]:
        """Return the leaves of `J^T weights`."""
        return combine(found, weights.unsqueeze(0), whole)

    if ranks is not None:
        vector = losses = ranks.gather(vector)
    return Linearized(vector, losses, aux, pullback, rebuild, as_they_are, paths, found)


def observe(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Observed:
    """Run the objective once, watching its parameters."""
    flat, rebuild = _tree.flatten(bind(fn, args, argnums)[0])
    layout, examples, batch = _structure(fn, args, _check.argnums(argnums, len(args)))
    inner = fn if batch is None else batch.fn
    unpackers: list[Callable[[list[Tensor]], Any]] = []

    def call(leaves: Sequence[Tensor], *example: Any) -> tuple[Tensor, list[Tensor]]:
        """Return losses as one vector (or the loss of one example), and tensors to unpack."""
        given = args if batch is None else batch.fill(args, example)
        losses, aux = split_aux(bind(inner, given, argnums)[1](rebuild(list(leaves))), has_aux)
        tensors, unpack = _tree.pack((losses, aux))
        unpackers.append(unpack)
        return as_vector(fn, losses) if batch is None else losses, tensors

    plans = fn.plans if isinstance(fn, InstanceWise) else {}
    recorded = run(call, flat, layout, examples, _tree.tensors(args), batch, plans)
    losses, aux = unpackers[-1](recorded.aux)
    return Observed(recorded, as_vector(fn, losses), losses, aux)


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
