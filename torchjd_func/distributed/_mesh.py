"""Where the parts of parameters are, and how they are gathered and scattered over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.distributed import _collectives


class Place(NamedTuple):
    """Where the parts of a leaf are."""

    mesh: Any
    placements: tuple[Any, ...]  # one for each dimension of the mesh
    shape: tuple[int, ...]  # of the whole leaf; tensors may have dimensions before it, of rows


def each(
    fn: Callable[[Tensor, Place], Any], tensors: list[Tensor], places: list[Place]
) -> list[Any]:
    """Apply a function to each leaf and its place."""
    return [fn(x, place) for x, place in zip(tensors, places, strict=True)]


def places_of(leaves: Sequence[Any]) -> list[Place]:
    """Return the place of each leaf; plain tensors are on all processes."""
    from torch.distributed.tensor import Replicate

    meshes = [leaf.device_mesh for leaf in leaves if is_sharded(leaf)]
    _check.one_mesh(meshes)
    _check.member(meshes[0].get_coordinate() is not None)
    everywhere = (Replicate(),) * meshes[0].ndim
    found = []
    for leaf in leaves:
        placements = tuple(leaf.placements) if is_sharded(leaf) else everywhere
        known = [_dim(p) is not None or p.is_replicate() for p in placements]
        _check.placements(placements, all(known))
        found.append(Place(meshes[0], placements, tuple(leaf.shape)))
    return found


def is_sharded(leaf: Any) -> bool:
    """Say whether a tensor is distributed; that takes long to import."""
    from torch.distributed.tensor import DTensor

    return isinstance(leaf, DTensor)


def local(leaf: Any) -> Tensor:
    """Return the part of this process; of a plain tensor all of it."""
    return leaf.to_local() if is_sharded(leaf) else leaf


def whole_like(leaf: Tensor) -> Tensor:
    """Return a placeholder of the whole leaf."""
    return _tree.placeholder(local(leaf), tuple(leaf.shape))


def wrap(parts: list[Tensor], places: list[Place], kept: list[bool]) -> list[Tensor]:
    """Return parts, or rows of parts, with their places; those of plain leaves as they are."""
    triples = zip(parts, places, kept, strict=True)
    return [_placed(x, place) if distributed else x for x, place, distributed in triples]


def _placed(part: Tensor, place: Place) -> Any:
    """Return the distributed tensor of which this is the part of this process."""
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
    return [_shift(p, lead) for p in place.placements]


def _shift(placement: Any, lead: int) -> Any:
    """Return a placement, with the leading dimensions counted."""
    from torch.distributed.tensor import Shard

    dim = _dim(placement)
    if dim is None or lead == 0:
        return placement
    if placement.is_shard():
        return Shard(dim + lead)
    return type(placement)(dim + lead, split_factor=placement.split_factor)


def _dim(placement: Any) -> int | None:
    """Return the dimension along which a tensor is cut, if it is."""
    # Tensor-parallel parameters are cut again by FSDP2, along what torch has no public name for:
    # `_StridedShard`, which does not say that it is a shard (torch 2.13).
    strided = hasattr(placement, "split_factor")
    return placement.dim if strided or placement.is_shard() else None


class Cut(NamedTuple):
    """How the processes of one dimension of a mesh share a tensor: in pieces of one length."""

    group: Any
    dim: int  # of the tensor
    length: int  # before the cut
    piece: int  # the longest
    own: slice  # of this process


def _cuts(place: Place, lead: int) -> list[Cut]:
    """Return the cuts from the whole leaf to the part of this process, first to last."""
    mesh, sizes, cuts = place.mesh, list(place.shape), []
    coordinate = mesh.get_coordinate()
    strided = [hasattr(p, "split_factor") for p in place.placements]  # FSDP cuts what others cut
    for i in sorted(range(mesh.ndim), key=strided.__getitem__):
        dim = _dim(place.placements[i])
        if dim is not None:
            length = sizes[dim]
            piece = -(-length // mesh.size(i))
            start = min(length, piece * coordinate[i])
            own = slice(start, min(length, start + piece))
            sizes[dim] = own.stop - own.start
            cuts.append(Cut(mesh.get_group(i), dim + lead, length, piece, own))
    return cuts


def gather(part: Tensor, place: Place) -> Tensor:
    """Return the whole leaf."""
    for cut in reversed(_cuts(place, part.ndim - len(place.shape))):
        own = _filled(part.movedim(cut.dim, 0), cut.piece)
        part = _collectives.all_gather(own, cut.group)[: cut.length].movedim(0, cut.dim)
    return part.contiguous()


def _filled(x: Tensor, length: int) -> Tensor:
    """Return a tensor of some length, filled up with zeros."""
    more = length - len(x)
    return torch.cat([x, x.new_zeros(more, *x.shape[1:])]) if more else x


def scatter(grads: list[Tensor], places: list[Place]) -> list[Tensor]:
    """Return this process's parts of means over processes; whole gradients are freed one by one."""
    return scatter_sums(grads, places, places[0].mesh.size())


def scatter_sums(grads: list[Tensor], places: list[Place], count: int = 1) -> list[Tensor]:
    """Return this process's parts of sums over processes, divided by a count."""
    return [_part_of_sum(grads.pop(0) / count, place) for place in places]


def _part_of_sum(whole: Tensor, place: Place) -> Tensor:
    """Return the part of this process of the sum over processes: cut first, then added up."""
    for cut in _cuts(place, whole.ndim - len(place.shape)):
        sent = _filled(whole.movedim(cut.dim, 0), cut.piece * _collectives.size(cut.group))
        own = _collectives.reduce_scatter_parts(sent, cut.group)
        whole = own[: cut.own.stop - cut.own.start].movedim(0, cut.dim)
    for i, placement in enumerate(place.placements):
        if placement.is_replicate():
            whole = _collectives.all_reduce(whole, place.mesh.get_group(i))
    return whole.contiguous()


def own_part(whole: Tensor, place: Place) -> Tensor:
    """Return the part of this process of what all processes have."""
    for cut in _cuts(place, whole.ndim - len(place.shape)):
        whole = whole.narrow(cut.dim, cut.own.start, cut.own.stop - cut.own.start)
    return whole.contiguous()


def copies(place: Place) -> int:
    """Return on how many processes each number of a leaf is."""
    # A list: torch.compile takes no product of a generator (torch 2.13).
    return prod([place.mesh.size(i) for i, p in enumerate(place.placements) if p.is_replicate()])


def total(x: Tensor, mesh: Any) -> Tensor:
    """Return the sum over all processes of a mesh."""
    for group in groups(mesh):
        x = _collectives.all_reduce(x, group)
    return x


def number(mesh: Any) -> int:
    """Return the number of this process in the order of the mesh."""
    number = 0
    for place, length in zip(mesh.get_coordinate(), mesh.shape, strict=True):
        number = number * length + place
    return number


def all_of(x: Tensor, mesh: Any) -> Tensor:
    """Return what all processes of a mesh hold, one after the other."""
    for group in reversed(groups(mesh)):
        x = _collectives.all_gather(x, group)
    return x


def groups(mesh: Any) -> list[Any]:
    """Return the groups of this process, one for each dimension of the mesh."""
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]
