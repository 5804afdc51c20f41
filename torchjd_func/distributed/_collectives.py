"""Collectives as pure functions: a process owns a part of the columns, in the processes' order.

Those of `torch.distributed` write into what they are given. On tensors that nobody else holds that
is pure, and a compiler rewrites each to a functional one within its graph (torch 2.10 to 2.13): the
private `torch.distributed._functional_collectives`, which may change, is not needed. Results are
constants of derivatives, of which these collectives have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from torchjd_func import _check

Group: TypeAlias = dist.ProcessGroup | None  # `None` is the default one, of all processes

# torch 2.13 has new names for two, and warns about the old ones, the only ones before; a build of
# torch without processes has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def size(group: Group) -> int:
    """Return the number of processes."""
    _check.process_group(dist.is_available() and dist.is_initialized())
    world = dist.get_world_size(group)
    _check.member(world > 0)
    return world


def rank(group: Group) -> int:
    """Return the number of this process in the group."""
    size(group)
    return dist.get_rank(group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum over processes, on each."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    return _run("all_reduce", dist.all_reduce, group, total)


def largest(numbers: list[int], groups: Sequence[Group]) -> list[int]:
    """Return the largest of each number over the processes of a mesh; not in a compiled function.

    The groups are those of the dimensions of the mesh.
    """
    own = torch.tensor(numbers, device=device(groups[0]))
    for group in groups:
        own = _run("all_reduce", partial(dist.all_reduce, op=dist.ReduceOp.MAX), group, own)
    return own.tolist()


def reduce_scatter(rows: Tensor, group: Group) -> Tensor:
    """Return this process's columns of the sum: `(m, n)` to `(m, ceil(n / world))`."""
    sent = _by_process(rows, size(group))
    own = sent.new_empty(rows.shape[0], sent.shape[1])
    return _run("reduce_scatter", _reduce_scatter, group, own, sent)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Return what all processes hold, one after the other: `(k, ...)` to `(world * k, ...)`."""
    found = x.new_empty((size(group) * x.shape[0], *x.shape[1:]))
    return _run("all_gather", _all_gather, group, found, x.detach().contiguous())


def all_to_all(rows: Tensor, group: Group) -> Tensor:
    """Return this process's columns of all rows: `(k, n)` to `(world * k, ceil(n / world))`."""
    sent = _by_process(rows, size(group))
    return _run("all_to_all", dist.all_to_all_single, group, torch.empty_like(sent), sent)


def gather_texts(text: str, group: Group) -> list[str]:
    """Return the texts of all processes, sent as numbers; not in a compiled function."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device(group))
    lengths = all_gather(torch.tensor([len(own)], device=own.device), group).tolist()
    padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
    rows = all_gather(padded.unsqueeze(0), group).tolist()
    pairs = zip(rows, lengths, strict=True)
    return [bytes(row[:length]).decode(errors="replace") for row, length in pairs]


def device(group: Group) -> torch.device:
    """Return a device on which the group has collectives: the CPU, if it is one."""
    size(group)
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _by_process(rows: Tensor, world: int) -> Tensor:
    """Return the parts of all processes, `(world * m, c)`, filled up with zeros."""
    m, n = rows.shape
    width = -(-n // world)
    padded = torch.nn.functional.pad(rows.detach(), (0, world * width - n))
    return padded.reshape(m, world, width).movedim(1, 0).reshape(world * m, width).contiguous()


def _run(name: str, fn: Callable[..., Any], group: Group, found: Any, *sent: Any) -> Any:
    """Return what a collective fills, once it has."""
    named(name, partial(fn, found, *sent, group=group), group)
    return found


def named(name: str, fn: Callable[[], Any], group: Group) -> Any:
    """Return what `fn`, which communicates, returns; say what failed, and where."""
    if torch.compiler.is_compiling():  # errors come when the graph runs, in torch's words
        return fn()
    try:
        return fn()
    except RuntimeError as error:
        _check.collective(name, rank(group), size(group), error)
