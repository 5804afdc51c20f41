"""Collectives as pure functions: a process owns a part of the columns, in the processes' order.

Those of `torch.distributed` write into what they are given. On tensors that nobody else holds that
is pure. In a compiled function each is an opaque operation, so that errors say what they say eager;
torch's functional collectives, which a compiler puts in the place of these, know neither process
nor name (torch 2.13). Results are constants of derivatives, of which these collectives have none.
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


def valid(group: Group) -> None:
    """Check that a value may be a group."""
    outside = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None
    known = group is None or group is outside or isinstance(group, dist.ProcessGroup)
    _check.group(group, known)


def rank(group: Group) -> int:
    """Return the number of this process in the group."""
    size(group)
    return dist.get_rank(group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum over processes, on each."""
    return _collect("all_reduce", x, list(x.shape), group)


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
    return _collect("reduce_scatter", sent, [rows.shape[0], sent.shape[1]], group)


def reduce_scatter_parts(x: Tensor, group: Group) -> Tensor:
    """Return this process's part of the sum: `(world * k, ...)` to `(k, ...)`."""
    return _collect("reduce_scatter", x, [len(x) // size(group), *x.shape[1:]], group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Return what all processes hold, one after the other: `(k, ...)` to `(world * k, ...)`."""
    return _collect("all_gather", x, [size(group) * x.shape[0], *x.shape[1:]], group)


def all_to_all(rows: Tensor, group: Group) -> Tensor:
    """Return this process's columns of all rows: `(k, n)` to `(world * k, ceil(n / world))`."""
    sent = _by_process(rows, size(group))
    return _collect("all_to_all", sent, list(sent.shape), group)


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


def _collect(name: str, x: Tensor, shape: list[int], group: Group) -> Tensor:
    """Return what a collective makes of a tensor, a tensor of some shape."""
    if torch.compiler.is_compiling():
        return _collected(name, x.detach(), shape, named(group))
    return _communicate(name, x, shape, group)


@torch.library.custom_op("torchjd_func::collect", mutates_args=())
def _collected(name: str, x: Tensor, shape: Sequence[int], group: str) -> Tensor:
    """Return what a collective makes of a tensor."""
    return _communicate(name, x, shape, group_of(group))


@_collected.register_fake
def _(name: str, x: Tensor, shape: Sequence[int], group: str) -> Tensor:
    return x.new_empty(shape)


def _communicate(name: str, x: Tensor, shape: Sequence[int], group: Group) -> Tensor:
    """Fill a tensor of some shape with what a collective makes of another one."""
    if x.is_meta:  # there are no numbers to exchange
        return x.new_empty(shape)
    if name == "all_reduce":
        total = x.detach().clone(memory_format=torch.contiguous_format)
        return _run(name, dist.all_reduce, group, total)
    fill = {
        "reduce_scatter": _reduce_scatter,
        "all_gather": _all_gather,
        "all_to_all": dist.all_to_all_single,
    }[name]
    return _run(name, fill, group, x.new_empty(shape), x.detach().contiguous())


def named(group: Group) -> str:
    """Return the name of a group, by which an opaque operation knows it."""
    return "" if group is None else group.group_name


def group_of(name: str) -> Group:
    """Return the group of a name; torch has no public function that does (torch 2.13)."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # pyright: ignore


def _run(name: str, fn: Callable[..., Any], group: Group, out: Tensor, *sent: Tensor) -> Tensor:
    """Return what a collective fills, once it has; say what failed, and where."""
    try:
        fn(out, *sent, group=group)
    except RuntimeError as error:
        _check.collective(name, rank(group), size(group), error)
    return out
