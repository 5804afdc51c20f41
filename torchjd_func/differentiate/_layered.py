"""Linearize an objective layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._layerwise import (
    Batch,
    Larger,
    Problem,
    Recorded,
    combine,
    layers,
    run,
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
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    *,
    check: bool = True,
) -> Observed:
    """Run the objective once, watching its parameters."""
    primals, _ = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    kind, batch = _structure(fn, args, _check.argnums(argnums, len(args)))
    inner = fn if batch is None else batch.fn
    unpackers: list[Callable[[list[Tensor]], Any]] = []

    def call(
        given: tuple[Any, ...], leaves: Sequence[Tensor], *example: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Return losses as one vector (or the loss of one example), and tensors to unpack."""
        given = given if batch is None else batch.fill(given, example)
        losses, aux = split_aux(bind(inner, given, argnums)[1](rebuild(list(leaves))), has_aux)
        tensors, unpack = _tree.pack((losses, aux))
        unpackers.append(unpack)
        return as_vector(fn, losses) if batch is None else losses, tensors

    size = 0 if batch is None else _batch_size(batch)
    larger = partial(_larger, fn, args, _check.argnums(argnums, len(args)), call)
    inputs = _tree.tensors(args)
    plans = fn.plans if isinstance(fn, InstanceWise) and check else {}
    check = check and isinstance(fn, InstanceWise) and fn.check
    names = _tree.paths(primals)
    problem = Problem(partial(call, args), flat, kind, size, inputs, batch, larger, check, names)
    recorded = run(problem, plans)
    losses, aux = unpackers[-1](recorded.aux)
    return Observed(recorded, as_vector(fn, losses), losses, aux)


def _structure(
    fn: Callable[..., Any], args: tuple[Any, ...], positions: tuple[int, ...]
) -> tuple[str, Batch | None]:
    """Return how the objective treats examples, and how to map over them."""
    if not isinstance(fn, InstanceWise):
        return "shared", None
    if fn.example is None:
        return "batched", None
    rest = tuple(place for place in range(len(args)) if place not in positions)
    dims = fn.example.dims(len(args))
    batch = Batch(fn.example.fn, rest, args, dims, fn.example.randomness)
    if _batch_size(batch) and all(dims[position] is None for position in positions):
        return "vmapped", batch
    return "batched", None


def _batch_size(batch: Batch) -> int:
    """Return how many examples an objective of one example is mapped over."""
    pairs = [(batch.dims[i], x) for i in batch.places for x in _tree.tensors(batch.args[i])]
    sizes = [x.shape[dim] for dim, x in pairs if isinstance(dim, int)]
    return sizes[0] if sizes else 0


def _larger(
    fn: Callable[..., Any], args: tuple[Any, ...], positions: tuple[int, ...], call: Call
) -> Iterator[Larger]:
    """Yield the objective with the last example twice, as far as arguments tell which have some."""
    rest = [place for place in range(len(args)) if place not in positions]
    in_dims = fn.in_dims if isinstance(fn, InstanceWise) else None
    if in_dims is not None:
        _check.in_dims(in_dims, len(args))
        dims = dict(enumerate(in_dims))
        choices = [[place for place in rest if dims[place] is not None]]
    else:
        dims = dict.fromkeys(rest, 0)
        choices = [rest[skipped:] for skipped in range(len(rest))]
    for places in choices:
        sizes = {
            x.shape[dims[place]]: None
            for place in places
            for x in _tree.tensors(args[place])
            if x.ndim > dims[place]
        }
        for size in reversed(list(sizes)):
            grown = list(args)
            for place in places:
                grow = partial(_grow, dim=dims[place], size=size)
                grown[place] = _tree.map(grow, args[place])
            yield Larger(size, partial(call, tuple(grown)), _tree.tensors(tuple(grown)))


def _grow(leaf: Any, *, dim: int, size: int) -> Any:
    """Repeat the last example of a tensor that has as many."""
    if not isinstance(leaf, Tensor) or leaf.ndim <= dim or leaf.shape[dim] != size:
        return leaf
    return torch.cat([leaf, leaf.narrow(dim, size - 1, 1)], dim)
