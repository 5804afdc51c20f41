"""One forward pass of an objective, and the linear map that pulls weights back to parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._accumulate import Accumulated
from torchjd_func.differentiate._layered import observe
from torchjd_func.differentiate._layerwise import Batch, Layout, combine
from torchjd_func.differentiate._multitask import linearize_multitask
from torchjd_func.differentiate._objectives import InstanceWise, MultiTask
from torchjd_func.differentiate._primitives import (
    Linearized,
    as_vector,
    basis,
    bind,
    identity,
    pull_rows,
    split_aux,
    vjp_aux,
)
from torchjd_func.differentiate._scaled import Scaled, multiplied, scale_by

PyTree = Any


def linearize(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    method: str = "auto",
) -> Linearized:
    """Run the objective once and keep what is needed to pull cotangents back."""
    if isinstance(fn, MultiTask):
        return linearize_multitask(fn, args, argnums, has_aux, method)
    if isinstance(fn, Scaled):
        return _linearize_scaled(fn, args, argnums, has_aux, method)
    if isinstance(fn, Accumulated):
        return _linearize_accumulated(fn, args, argnums, has_aux, method)
    primals, call = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    paths = _tree.paths(primals)
    _check.params(f"argument {argnums}", paths, flat)
    if method == "layerwise" or (method == "auto" and isinstance(fn, InstanceWise)):
        return _linearize_layers(fn, args, argnums, has_aux)

    def from_leaves(leaves: list[Tensor]) -> tuple[Tensor, tuple[PyTree, PyTree]]:
        """Return the losses as one vector, for torch.func to differentiate."""
        losses, aux = split_aux(call(rebuild(leaves)), has_aux)
        return as_vector(fn, losses), (losses, aux)

    vector, pull, (losses, aux) = vjp_aux(from_leaves, flat)
    return Linearized(vector, losses, aux, lambda c: pull(c)[0], rebuild, identity, paths)


def _linearize_layers(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Run the objective once and keep what each use of parameters was applied to."""
    primals, _ = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
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
    vector, tensors, pull = observe(call, flat, layout, examples, batch, plans)
    losses, aux = unpackers[-1](tensors)
    layers = pull(*_cotangents(as_vector(fn, losses), layout))
    whole = (tuple(range(len(flat))),)

    def pullback(weights: Tensor) -> list[Tensor]:
        """Return the leaves of `J^T weights`."""
        return combine(layers, weights.unsqueeze(0), whole)

    paths = _tree.paths(primals)
    return Linearized(vector, losses, aux, pullback, rebuild, identity, paths, layers)


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


def _linearize_accumulated(
    fn: Accumulated,
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    method: str,
) -> Linearized:
    """Differentiate one microbatch after the other, and keep the sum of the Jacobians."""
    _check.choice("has_aux", has_aux, (fn.has_aux,))
    _check.choice("method", method, ("auto", "jacobian", "product"))
    parts, total = [], None
    for arguments in fn.split(args):
        part, rows = _microbatch(fn, arguments, argnums, has_aux)
        total = rows if total is None else _tree.map(torch.add, total, rows)
        parts.append(part)
    jacobian = _tree.map(lambda leaf: leaf / fn.n, total)
    return Linearized(
        _tree.mean([part.vector for part in parts]),
        _tree.mean([part.losses for part in parts]),
        _tree.stack([part.aux for part in parts]),
        lambda weights: _tree.weighted_sum(jacobian, weights),
        parts[0].rebuild,
        lambda grads, weights: _tree.mean([part.assemble(grads, weights) for part in parts]),
        parts[0].paths,
    )


def _linearize_scaled(
    fn: Scaled,
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    method: str,
) -> Linearized:
    """Differentiate larger losses, and undo the scale of all that comes out."""
    large = linearize(multiplied(fn.fn, fn.scale, has_aux), args, argnums, has_aux, method)
    up, down = partial(scale_by, fn.scale), partial(scale_by, 1 / fn.scale)
    layers = large.layers
    if layers is not None:
        layers = layers._replace(cotangents=down(layers.cotangents), rows=down(layers.rows))
    return large._replace(
        vector=down(large.vector),
        losses=down(large.losses),
        pullback=lambda cotangent: down(large.pullback(cotangent)),
        assemble=lambda grads, weights: down(large.assemble(up(grads), weights)),
        layers=layers,
    )


def _microbatch(
    fn: Accumulated, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> tuple[Linearized, PyTree]:
    """Return what is kept of a microbatch, and its Jacobian; the graph is freed on return."""
    part = linearize(fn.fn, args, argnums, has_aux, "jacobian")
    rows = pull_rows(part.pullback, basis(part.vector), fn.chunk_size)
    return part._replace(pullback=_freed), rows


def _freed(cotangent: Tensor) -> list[Tensor]:
    """Stand for the pullback of a graph that is gone."""
    raise NotImplementedError
