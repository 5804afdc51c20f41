"""Where the parts of parameters are, and how they are gathered and scattered over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
        _check.placements(placements, all(p.is_shard() or p.is_replicate() for p in placements))
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
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + lead) if p.is_shard() else p for p in place.placements]


def gather(part: Tensor, place: Place) -> Tensor:
    """Return the whole leaf."""
    return _named("full_tensor", _placed(part, place).full_tensor, place.mesh)


def scatter(grads: list[Tensor], places: list[Place]) -> list[Tensor]:
    """Return this process's parts of means over processes; whole gradients are freed one by one."""
    return scatter_sums(grads, places, places[0].mesh.size())


def scatter_sums(grads: list[Tensor], places: list[Place], count: int = 1) -> list[Tensor]:
    """Return this process's parts of sums over processes, divided by a count."""
    from torch.distributed.tensor import Partial

    return [_part(grads.pop(0) / count, place, Partial()) for place in places]


def cut(whole: Tensor, place: Place) -> Tensor:
    """Return the part of this process of what all processes have."""
    from torch.distributed.tensor import Replicate

    return _part(whole, place, Replicate())


def _part(whole: Tensor, place: Place, held: Any) -> Tensor:
    """Return the part of this process of a whole leaf, or of shares that add up to it."""
    from torch.distributed.tensor import DTensor

    mesh, lead = place.mesh, whole.ndim - len(place.shape)
    known = DTensor.from_local(whole, mesh, [held] * mesh.ndim, run_check=False)
    move = partial(known.redistribute, placements=_shifted(place, lead))
    return _named("redistribute", move, mesh).to_local()


def copies(place: Place) -> int:
    """Return on how many processes each number of a leaf is."""
    # A list: torch.compile takes no product of a generator (torch 2.13).
    return prod([place.mesh.size(i) for i, p in enumerate(place.placements) if p.is_replicate()])


def _named(name: str, fn: Callable[[], Any], mesh: Any) -> Any:
    """Return what `fn`, which communicates, returns; say what failed, and where."""
    return _collectives.named(name, fn, mesh.get_group() if mesh.ndim == 1 else None)


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
