"""Linearize an objective layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise import (
    Batch,
    Layers,
    Layout,
    Plan,
    PlanChanged,
    record,
    scout,
)
from torchjd_func.differentiate._layerwise import layers as pull_layers

Call = Callable[..., tuple[Tensor, list[Tensor]]]


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
