"""Gradients of tensors of plain autograd, some rows of a Jacobian at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check


class Pull(NamedTuple):
    """One row of a Jacobian: what is differentiated, and by which cotangents."""

    place: int
    outputs: list[Tensor]
    cotangents: list[Tensor]


class Ancestry(NamedTuple):
    """What tensors were computed from."""

    leaves: dict[int, Tensor]  # by identity
    edges: set[Any]


def rows(
    pulls: Sequence[Pull], params: Sequence[Tensor], m: int, chunk_size: int | None, retain: bool
) -> list[Tensor | None]:
    """Return a Jacobian by parameter, `(m, *shape)`, with zeros in the rows of no pull.

    `None` for a parameter that nothing depends on.
    """
    leaves: list[Tensor | None] = [None] * len(params)
    step = chunk_size or max(1, len(pulls))
    for start in range(0, len(pulls), step):
        chunk = pulls[start : start + step]
        grads = _pull_back(chunk, params, retain or start + step < len(pulls))
        _fill(leaves, params, m, [pull.place for pull in chunk], grads)
    return leaves


def combined(
    pulls: Sequence[Pull], weights: Tensor, params: Sequence[Tensor], retain: bool
) -> list[Tensor | None]:
    """Return the sum of the rows, each by its weight, in one pass."""
    totals: dict[int, tuple[Tensor, Tensor]] = {}
    for place, outputs, cotangents in pulls:
        for output, cotangent in zip(outputs, cotangents, strict=True):
            term = weights[place].to(cotangent.dtype) * cotangent
            known = totals.get(id(output))
            totals[id(output)] = output, term if known is None else known[1] + term
    if not totals:
        return [None] * len(params)
    outputs, cotangents = zip(*totals.values(), strict=True)
    return gradient(outputs, cotangents, params, retain)


def gradient(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], params: Sequence[Tensor], retain: bool
) -> list[Tensor | None]:
    """Return the gradient for each parameter, dense; `None` where nothing depends on it."""
    grads = torch.autograd.grad(outputs, params, cotangents, retain_graph=retain, allow_unused=True)
    return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


def ancestry(tensors: Sequence[Tensor], stop: Sequence[Tensor] = ()) -> Ancestry:
    """Return what tensors were computed from, other than through `stop`."""
    ends = {edge_of(tensor) for tensor in stop}
    waiting = [edge_of(tensor) for tensor in tensors]
    leaves: dict[int, Tensor] = {}
    edges: set[Any] = set()
    while waiting:
        edge = waiting.pop()
        if edge[0] is None or edge in ends or edge in edges:
            continue
        edges.add(edge)
        _check.visible(edge[0].name())
        if hasattr(edge[0], "variable"):
            leaves[id(edge[0].variable)] = edge[0].variable
        waiting += edge[0].next_functions
    return Ancestry(leaves, edges)


def edge_of(tensor: Tensor) -> Any:
    """Return where a tensor stands in the graph, node and output; a leaf, where it accumulates."""
    if tensor.requires_grad and tensor.grad_fn is None:
        return torch.autograd.graph.get_gradient_edge(tensor)[:2]
    return tensor.grad_fn, tensor.output_nr


def _pull_back(
    chunk: Sequence[Pull], params: Sequence[Tensor], retain: bool
) -> Sequence[Tensor | None]:
    """Return the rows of a chunk, `(k, *shape)` for each parameter, in one pass."""
    if len(chunk) == 1:
        grads = gradient(chunk[0].outputs, chunk[0].cotangents, params, retain)
        return [None if grad is None else grad.unsqueeze(0) for grad in grads]
    outputs = list({id(out): out for pull in chunk for out in pull.outputs}.values())
    cotangents = [torch.stack([_cotangent(pull, out) for pull in chunk]) for out in outputs]
    return torch.autograd.grad(
        outputs, params, cotangents, retain_graph=retain, allow_unused=True, is_grads_batched=True
    )


def _cotangent(pull: Pull, output: Tensor) -> Tensor:
    """Return what a pull gives to an output: zeros, if it does not have it."""
    for own, cotangent in zip(pull.outputs, pull.cotangents, strict=True):
        if own is output:
            return cotangent
    return output.new_zeros(output.shape)


def _fill(
    leaves: list[Tensor | None],
    params: Sequence[Tensor],
    m: int,
    places: list[int],
    grads: Sequence[Tensor | None],
) -> None:
    """Write the rows of a chunk to their places."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None:
            leaf = leaves[i]
            leaf = param.new_zeros((m, *param.shape)) if leaf is None else leaf
            leaf[places] = grad
            leaves[i] = leaf
