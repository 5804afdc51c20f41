"""Linearize an objective layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._layerwise import (
    Batch,
    Layers,
    Layout,
    Plan,
    PlanChanged,
    combine,
    record,
    scout,
)
from torchjd_func.differentiate._layerwise import layers as pull_layers
from torchjd_func.differentiate._objectives import InstanceWise
from torchjd_func.differentiate._pullback import (
    Linearized,
    as_they_are,
    as_vector,
    basis,
    bind,
    split_aux,
)

Call = Callable[..., tuple[Any, list[Tensor]]]


def linearize_layers(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Run the objective once and keep what each use of parameters was applied to."""
    primals, _ = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    layout, examples, batch = _structure(fn, args, _check.argnums(argnums, len(args)))
    inputs = [x for x in _tree.leaves(args) if isinstance(x, Tensor)]
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
    vector, tensors, pull = observe(call, flat, layout, examples, inputs, batch, plans)
    losses, aux = unpackers[-1](tensors)
    layers = pull(*_cotangents(as_vector(fn, losses), layout))
    whole = (tuple(range(len(flat))),)

    def pullback(weights: Tensor) -> list[Tensor]:
        """Return the leaves of `J^T weights`."""
        return combine(layers, weights.unsqueeze(0), whole)

    paths = _tree.paths(primals)
    return Linearized(vector, losses, aux, pullback, rebuild, as_they_are, paths, layers)


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


def _cotangents(vector: Tensor, layout: Layout) -> tuple[Any, Callable[[], Tensor], int]:
    """Return what to pull back: each loss by itself, unless examples are apart anyway."""
    whole = partial(basis, vector)
    shared = layout.kind == "shared"
    return (whole() if shared else torch.ones_like(vector)), whole, vector.shape[0]


def observe(
    call: Call,
    leaves: Sequence[Tensor],
    layout: Layout,
    examples: Sequence[Tensor],
    inputs: Sequence[Tensor],
    batch: Batch | None,
    plans: dict[Any, Plan],
) -> tuple[Any, list[Tensor], Callable[..., Layers]]:
    """Run an objective as planned, or plan first.

    Args:
        call: `(leaves, *example) -> (outputs, aux tensors)`.
        leaves: The parameters.
        layout: How the objective treats examples.
        examples: Tensors that may have one row for each example.
        inputs: All tensors among the other arguments.
        batch: What to map over, for an objective of one example.
        plans: What is remembered of earlier runs, by shapes.

    Returns:
        `(outputs, aux, pull)`; `pull(cotangents, basis, m)` returns the layers.
    """
    key = None if torch.compiler.is_compiling() else _signature(leaves, layout, examples)
    known = plans.get(key)
    plan = scout(call, leaves, layout, examples, inputs, batch) if known is None else known
    try:
        recorded = record(call, leaves, plan, batch)
    except PlanChanged:
        plan = scout(call, leaves, layout, examples, inputs, batch)
        recorded = record(call, leaves, plan, batch)
    if layout.kind == "batched" and recorded.outputs.shape[0] != layout.size:
        layout = Layout("batched", recorded.outputs.shape[0])  # the first array has no examples
        return observe(call, leaves, layout, examples, inputs, batch, plans)
    if key is not None:
        plans[key] = plan
    return recorded.outputs, recorded.aux, lambda *given: pull_layers(recorded, *given)


def _signature(leaves: Sequence[Tensor], layout: Layout, examples: Sequence[Tensor]) -> Any:
    """Return what the plan of an objective depends on, besides its code."""
    return layout, tuple((tuple(x.shape), x.dtype, x.device) for x in (*leaves, *examples))
