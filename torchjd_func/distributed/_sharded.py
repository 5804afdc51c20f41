"""Parameters that are sharded over ranks (FSDP2), each of which has a part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._types import Aggregator, PyTree, State
from torchjd_func.differentiate._linearized import Contraction
from torchjd_func.differentiate._objective import Plain, as_objective
from torchjd_func.differentiate._sharded import Parts, Sharded
from torchjd_func.distributed import _collectives


class Place(NamedTuple):
    """Where the parts of a leaf are."""

    mesh: Any
    placements: tuple[Any, ...]  # one for each dimension of the mesh
    shape: tuple[int, ...]  # of the whole leaf; tensors may have dimensions before it, of rows


def sharded(objective: Callable[..., Any]) -> Sharded:
    r"""Differentiate an objective by parameters that are sharded, such as those of FSDP2.

    Parameters are `DTensor`s, as after `torch.distributed.fsdp.fully_shard`, of any placements
    `Shard` and `Replicate` on one mesh, of one or more dimensions. Losses are means over the part
    of the batch that a rank has, parts are equal, and the rule is a plain one:

        objective = jd.distributed.sharded(losses)  # losses(params, *part_of_batch), whole params
        params = dict(model.named_parameters())  # DTensors
        grads, losses, state = jd.grad_and_value(objective, jd.upgrad())(state, params, x, y)

    All is as in one process with the whole batch; gradients have the placements of the parameters.
    Whole parameters are there during the forward and the backward pass of a rank, and at the end
    of the latter `chunk_size` whole rows (by default `m`), which are scattered leaf by leaf: of the
    Jacobian a rank keeps `m n / W` numbers. It contracts them, and `(m, m)` is added up over ranks,
    replicas counted once. The step compiles with `fullgraph=True`.

    `objective` calls a module without hooks: `torch.func.functional_call(skeleton, params, (x,))`
    with a copy that `fully_shard` has not touched, on the device `"meta"` say.

    Args:
        objective: `fn(params, *args)` of whole parameters, as plain tensors, and of the part of the
            batch; a plain function, not one with a structure of its own.

    Returns:
        The objective for `jd.jac` (rows as `DTensor`s), `jd.gramian`, `jd.gramian_vjp`, `jd.grad`,
        their variants and `jd.init_state`, with `route="auto"` or `"jacobian"`. Losses are means
        over ranks; `aux` stays that of the rank. `jd.trimmed_mean` works on the columns of a rank;
        for other rules that need the rows, these are gathered on each rank, in the state too.

    Raises:
        TypeError: If `objective` has a structure of its own, such as that of `jd.instancewise`.
        ValueError: From transforms, if a parameter is placed in another way, on several meshes, or
            none is a `DTensor`; or if another route is asked for.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> w = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
        >>> objective = jd.distributed.sharded(lambda w: (w.sum(), w[0] - 2 * w[1]))
        >>> jd.grad(objective, jd.upgrad())(None, w)[0].to_local()
        tensor([ 1.3500, -0.4500])
        >>> dist.destroy_process_group()
    """
    inner = as_objective(objective)
    if not isinstance(inner, Plain):
        remedy = "Pass a function of means."
        name, rule = "the objective of `jd.distributed.sharded`", "be a plain function"
        _check.fail(TypeError, name, rule, repr(objective), remedy)
    return Sharded(inner, _parts, _gathered, _whole_like)


def _parts(leaves: list[Tensor]) -> Parts:
    """Return what this rank keeps, and how it works with the others."""
    return _parts_at(_places(leaves), [_is_sharded(leaf) for leaf in leaves])


def _parts_at(places: list[Place], kept: list[bool]) -> Parts:
    """Return what this rank keeps of leaves at some places."""

    def some(chosen: Sequence[int]) -> Parts:
        """Return the same for some of the leaves."""
        return _parts_at([places[i] for i in chosen], [kept[i] for i in chosen])

    return Parts(
        partial(_scatter, places=places),
        partial(_wrap, places=places, kept=kept),
        partial(_mean, mesh=places[0].mesh),
        partial(_contract, places=places),
        partial(_by_rows, places=places),
        some,
    )


def _gathered(leaves: list[Tensor]) -> list[Tensor]:
    """Return the leaves, whole."""
    return _each(_gather, [_local(leaf.detach()) for leaf in leaves], _places(leaves))


def _each(
    fn: Callable[[Tensor, Place], Any], tensors: list[Tensor], places: list[Place]
) -> list[Any]:
    """Apply a function to each leaf and its place."""
    return [fn(x, place) for x, place in zip(tensors, places, strict=True)]


def _places(leaves: Sequence[Any]) -> list[Place]:
    """Return the place of each leaf; plain tensors are on all ranks."""
    from torch.distributed.tensor import Replicate

    meshes = [leaf.device_mesh for leaf in leaves if _is_sharded(leaf)]
    _check.one_mesh(meshes)
    everywhere = (Replicate(),) * meshes[0].ndim
    found = []
    for leaf in leaves:
        placements = tuple(leaf.placements) if _is_sharded(leaf) else everywhere
        _check.placements(placements, all(p.is_shard() or p.is_replicate() for p in placements))
        found.append(Place(meshes[0], placements, tuple(leaf.shape)))
    return found


def _is_sharded(leaf: Any) -> bool:
    """Say whether a tensor is distributed; that takes long to import."""
    from torch.distributed.tensor import DTensor

    return isinstance(leaf, DTensor)


def _local(leaf: Any) -> Tensor:
    """Return the part of this rank; of a plain tensor all of it."""
    return leaf.to_local() if _is_sharded(leaf) else leaf


def _whole_like(leaf: Tensor) -> Tensor:
    """Return a placeholder of the whole leaf."""
    return _tree.placeholder(_local(leaf), tuple(leaf.shape))


def _wrap(parts: list[Tensor], places: list[Place], kept: list[bool]) -> list[Tensor]:
    """Return parts, or rows of parts, with their places; those of plain leaves as they are."""
    triples = zip(parts, places, kept, strict=True)
    return [_placed(x, place) if distributed else x for x, place, distributed in triples]


def _placed(part: Tensor, place: Place) -> Any:
    """Return the distributed tensor of which this is the part of this rank."""
    from torch.distributed.tensor import DTensor

    lead = part.ndim - len(place.shape)
    shape = torch.Size((*part.shape[:lead], *place.shape))
    strides = torch.empty(shape, device="meta").stride()
    placements = _shifted(place, lead)
    return DTensor.from_local(
        part, place.mesh, placements, run_check=False, shape=shape, stride=strides
    )


def _shifted(place: Place, lead: int) -> list[Any]:
    """Return the placements, with the leading dimensions counted."""
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + lead) if p.is_shard() else p for p in place.placements]


def _gather(part: Tensor, place: Place) -> Tensor:
    """Return the whole leaf."""
    return _named("full_tensor", _placed(part, place).full_tensor, place.mesh)


def _scatter(grads: list[Tensor], places: list[Place]) -> list[Tensor]:
    """Return this rank's parts of the means over ranks; whole gradients are let go one by one."""
    from torch.distributed.tensor import Partial

    return [_part(grads.pop(0) / place.mesh.size(), place, Partial()) for place in places]


def _cut(whole: Tensor, place: Place) -> Tensor:
    """Return the part of this rank of what all ranks have."""
    from torch.distributed.tensor import Replicate

    return _part(whole, place, Replicate())


def _part(whole: Tensor, place: Place, held: Any) -> Tensor:
    """Return the part of this rank of a whole leaf, or of shares that add up to it."""
    from torch.distributed.tensor import DTensor

    mesh, lead = place.mesh, whole.ndim - len(place.shape)
    known = DTensor.from_local(whole, mesh, [held] * mesh.ndim, run_check=False)
    move = partial(known.redistribute, placements=_shifted(place, lead))
    return _named("redistribute", move, mesh).to_local()


def _named(name: str, fn: Callable[[], Any], mesh: Any) -> Any:
    """Return what `fn`, which communicates, returns; say what failed, and where."""
    return _collectives.named(name, fn, mesh.get_group() if mesh.ndim == 1 else None)


def _sum(x: Tensor, mesh: Any) -> Tensor:
    """Return the sum over all ranks of a mesh."""
    for dim in range(mesh.ndim):
        x = _collectives.all_reduce(x, mesh.get_group(dim))
    return x


def _mean(losses: Tensor, mesh: Any) -> Tensor:
    """Return the mean over all ranks of a mesh."""
    return _sum(losses.detach() / mesh.size(), mesh)


def _copies(place: Place) -> int:
    """Return on how many ranks each number of a leaf is."""
    # A list: torch.compile takes no product of a generator (torch 2.13).
    return prod([place.mesh.size(i) for i, p in enumerate(place.placements) if p.is_replicate()])


def _contract(
    route: Contraction, groups: _tree.Groups, places: list[Place]
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Add up what ranks contract of their parts; leaves with as many copies are a group."""
    copies = [_copies(place) for place in places]
    split = [
        (owner, tuple(i for i in group if copies[i] == count), count)
        for owner, group in enumerate(groups)
        for count in sorted({copies[i] for i in group})
    ]
    matrices, pullback = route(tuple(leaves for _, leaves, _ in split))
    shares = torch.stack([x / count for x, (_, _, count) in zip(matrices, split, strict=True)])
    owners = torch.tensor([owner for owner, _, _ in split], device=shares.device)
    sums = shares.new_zeros(len(groups), *shares.shape[1:]).index_add(0, owners, shares)
    return _sum(sums, places[0].mesh), lambda weights: pullback(weights[owners])


def _by_rows(rule: Aggregator, places: list[Place]) -> Callable[..., tuple[PyTree, Any]]:
    """Return a rule that needs the rows, for rows that are spread over ranks."""
    return partial(_aggregate, rule=rule, places=places)


def _aggregate(
    jac: PyTree,
    state: State,
    *,
    losses: Tensor,
    rule: Aggregator,
    places: list[Place],
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Aggregate the columns of this rank, if the rule takes columns; else whole rows."""
    flat, rebuild = _tree.flatten(jac)
    rows = [_local(leaf) for leaf in flat]
    if rule.columnwise:
        grads, state = rule(rows, state, losses=losses, present=present)
    else:
        whole = _each(_gather, rows, places)
        grads, state = rule(rebuild(whole), state, losses=losses, present=present)
        grads = _each(_cut, _tree.leaves(grads), places)
    return rebuild(_wrap(grads, places, [_is_sharded(leaf) for leaf in flat])), state
