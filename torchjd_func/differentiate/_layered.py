"""Linearize an objective layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._pack import pack
from torchjd_func.differentiate._autocast import as_called
from torchjd_func.differentiate._filled import grow
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layerwise import (
    Batch,
    Call,
    Layers,
    Layout,
    Problem,
    Recorded,
    Returned,
    combine,
    jacobian,
    joined,
    layers,
    run,
)
from torchjd_func.differentiate._layerwise import plan as plan_run
from torchjd_func.differentiate._linearized import Jacobian, Leaves, Linearized, Seen, split_aux
from torchjd_func.differentiate._mask import all_absent, masked
from torchjd_func.differentiate._objective import Objective
from torchjd_func.differentiate._pullback import as_it_is, basis, enlarged, unscaled
from torchjd_func.differentiate._pullback import call as invoke
from torchjd_func.differentiate._request import Bound, Request, bind, chosen

PyTree = Any


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
    _check.dependent(recorded.dependent or all_absent(request.present))
    ranks = fn.ranks if isinstance(fn, InstanceWise) else None
    present = None if request.present is None else masked(losses, request.present)[1]
    vector = masked(vector, present)[0]
    shared = recorded.plan.layout.kind == "shared"
    unit = torch.ones_like(vector) if present is None else present.to(vector.dtype)
    found = layers(
        recorded,
        enlarged(basis(vector) if shared else unit, request.scale),
        lambda: enlarged(basis(vector), request.scale),
        len(vector),
        ranks,
        request.chunk_size,
    )
    if present is not None and not shared:
        found = _only(found, present)
    places = tuple(range(len(bound.paths)))

    def pullback(weights: Tensor) -> list[Tensor]:
        return unscaled(combine(found, weights.unsqueeze(0), (places,)), request.scale)

    def rows() -> list[Tensor]:
        return unscaled([jacobian(found, leaf) for leaf in places], request.scale)

    if ranks is not None:
        vector = losses = joined(vector, ranks)
        present = None if present is None or ranks.whole else joined(present, ranks)
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


def _only(found: Layers, present: Tensor) -> Layers:
    """Take what absent examples give, which may not be a number, out of all rows."""
    return found._replace(
        arrays=[[_only_rows(x, present) for x in arrays] for arrays in found.arrays],
        cotangents=_present.rows(found.cotangents, present),
        rows={leaf: _present.rows(rows, present) for leaf, rows in found.rows.items()},
    )


def _only_rows(x: Tensor, present: Tensor) -> Tensor:
    """Take the examples that are absent out of an array; what all share has none."""
    return _present.rows(x, present) if len(x) == len(present) else x


def observe(fn: Objective, request: Request, *, check: bool = True) -> Observed:
    """Run the objective once, watching its parameters."""
    _check.flag("has_aux", request.has_aux)
    bound = bind(request)
    problem, unpackers = _problem(fn, request, bound, check)
    recorded = run(problem, _plans(fn, check))
    losses, aux = unpackers[-1](recorded.aux)
    return Observed(recorded, _tree.ravel(losses), losses, aux, bound)


def plan_layers(fn: Objective, request: Request) -> None:
    """Plan a run, for graphs to replay."""
    plan_run(_problem(fn, request, bind(request), True)[0], _plans(fn, True))


def _plans(fn: Objective, check: bool) -> dict[Any, Any]:
    """Return what is remembered of earlier runs; nothing for what is not to be proven."""
    return fn.plans if isinstance(fn, InstanceWise) and check else {}


def _problem(
    fn: Objective, request: Request, bound: Bound, check: bool
) -> tuple[Problem, list[Callable[[list[Tensor]], Any]]]:
    """Return the objective at one point, and what unpacks the outputs of its latest run."""
    args = request.args
    positions = _check.argnums(request.argnums, len(args))
    layout, batch = _structure(fn, args, positions)
    inner = fn if batch is None else batch.fn
    unpackers: list[Callable[[list[Tensor]], Any]] = []
    given = args, dict(request.kwargs)

    def call(
        data: tuple[tuple[Any, ...], Any], present: Any, leaves: Sequence[Tensor], *example: Any
    ) -> Callable[[], Returned]:
        """Run the objective, and return what reads the losses as one vector (or that of one)."""
        # In containers of its own: a run may take labels out of a batch, and there are several
        named = _tree.map(as_it_is, data[1])
        values = tuple([_own(x, place in positions) for place, x in enumerate(data[0])])
        values = values if batch is None else batch.fill(values, example)
        with as_called(request.autocast, watched=True):
            return partial(read, invoke(inner, bound.fill(leaves, values), named), present)

    def read(out: Any, present: Any) -> Returned:
        """Take losses out of what the objective returned, and tensors to unpack."""
        losses, aux = split_aux(out, request.has_aux)
        tensors, unpack = pack((losses, aux))
        unpackers.append(unpack)
        if batch is not None:
            _check.one_loss(losses)
            return Returned([losses], losses, tensors)
        if isinstance(fn, InstanceWise):
            _check.one_for_each_example(losses, fn.several)
        return Returned(_tree.leaves(losses), masked(losses, present)[0], tensors)

    def call_with(values: tuple[Any, ...]) -> Call:
        """Return the objective of other arguments, all of whose losses are present."""
        return partial(call, (values, given[1]), None)

    def noisy(change: Callable[[Tensor], Tensor]) -> list[tuple[Call, list[Tensor]]]:
        """Return the objective with other data, and the tensors among these."""
        own = set(_tree.tensors([args[i] for i in positions]))  # which modules may look at, too
        moved = {x: change(x) for x in problem.inputs if x not in own}
        data = _tree.map(lambda x: moved.get(x, x) if isinstance(x, Tensor) else x, given)
        return [(partial(call, data, request.present), _tree.tensors(data))]

    inputs = _tree.tensors(given)
    _check.not_nested(inputs)
    problem = Problem(
        call=partial(call, given, request.present),
        leaves=bound.leaves,
        layout=layout,
        inputs=inputs,
        batch=batch,
        larger=partial(_larger, fn, args, positions, call_with),
        noisy=noisy if layout.kind == "batched" else lambda change: [],
        check=check and _to_be_proven(fn, bound.leaves),
        names=bound.paths,
        generators={},
    )
    return problem, unpackers


def _own(value: PyTree, differentiated: bool) -> PyTree:
    """Return an argument in containers of its own; one that is differentiated gets such anyway."""
    return value if differentiated else _tree.map(as_it_is, value)


def _to_be_proven(fn: Objective, leaves: Sequence[Tensor]) -> bool:
    """Say whether a plan is to be proven; without numbers it cannot be."""
    return isinstance(fn, InstanceWise) and fn.check and not any(leaf.is_meta for leaf in leaves)


def _structure(
    fn: Callable[..., Any], args: tuple[Any, ...], positions: tuple[int, ...]
) -> tuple[Layout, Batch | None]:
    """Return how the objective treats examples, and how to map over them."""
    if not isinstance(fn, InstanceWise):
        return Layout("shared", 0), None
    if fn.example is None:
        return Layout("batched", 0), None
    rest = tuple(place for place in range(len(args)) if place not in positions)
    dims = fn.example.all_dims(len(args))
    batch = Batch(fn.example.fn, rest, args, dims, fn.example.randomness)
    sizes = _batch_sizes(batch)
    if 0 in sizes and fn.ranks is None:
        _check.losses((), ())
    size = sizes[0] if sizes else 0
    if size and all(dims[position] is None for position in positions):
        return Layout("vmapped", size), batch
    return Layout("batched", 0), None


def _batch_sizes(batch: Batch) -> list[int]:
    """Return how many examples each batched argument has."""
    pairs = [(batch.dims[i], x) for i in batch.places for x in _tree.tensors(batch.args[i])]
    return [x.shape[dim] for dim, x in pairs if isinstance(dim, int) and dim < x.ndim]


def _larger(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    positions: tuple[int, ...],
    call_with: Callable[[tuple[Any, ...]], Call],
) -> Iterator[tuple[int, Call, list[Tensor]]]:
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
            if x.ndim > dims[place] and x.shape[dims[place]]
        }
        for size in reversed(list(sizes)):
            grown = list(args)
            for place in places:
                more = partial(_one_more, dim=dims[place], size=size)
                grown[place] = _tree.map(more, args[place])
            yield size, call_with(tuple(grown)), _tree.tensors(grown)


def _one_more(leaf: Any, *, dim: int, size: int) -> Any:
    """Repeat the last example of a dense tensor that has as many."""
    dense = isinstance(leaf, Tensor) and leaf.layout == torch.strided
    return grow(leaf, dim, size, size + 1) if dense else leaf
