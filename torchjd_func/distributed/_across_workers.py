"""Rows of their own on several processes, of which a rule makes one direction."""

from __future__ import annotations

from torch import Tensor

from torchjd_func import _check
from torchjd_func._shares import Shares, Size, counted
from torchjd_func._types import Aggregator
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._exchange import Exchange, spread


def across_workers(
    aggregator: Aggregator, group: Group = None, *, check: bool = True
) -> Aggregator:
    r"""Aggregate rows that are spread over processes: usually one gradient of each worker.

    $$d = A(J), \qquad J = (g_1, \dots, g_W)^\top.$$

    Each process has `k` rows of its own (one loss: `k = 1`), and `m = k W`, counted process by
    process. A robust rule such as `jd.krum` or `jd.trimmed_mean` gives a direction that the
    arbitrary rows of some workers move no further than the rule promises, also if they hold
    infinities or NaN: a row of weight 0 is left out. All processes get the same direction. With
    `present`, on all processes or on none, a process says which of its own rows there are; with
    `size=0`, that there are none.

    What is promised are rows, on trust in all else: each worker runs this program, and comes to
    each collective with numbers of the announced shapes. It computes a part of the Gramian and of
    the direction for all others, so that one that sends wrong parts there, or that hangs, spoils or
    stops all. `check` compares what workers say about themselves. Nothing that is received is
    executed: no pickles are exchanged.

    No process has all rows: an all-to-all deals the columns out, partial Gramians are added up, and
    the direction is gathered. Numbers that a process hands to collectives, with `n'` as for
    `jd.distributed.data_parallel`: `(k + 1) n' + m^2 + m`; without the square for
    `jd.trimmed_mean`; `n + m` for weights that look at no gradient; and `m n + m` for all others
    that need the rows, which are gathered on each process.

    Args:
        aggregator: For the rows of all processes.
        group: The processes; by default all.
        check: As for `jd.distributed.data_parallel`.

    Returns:
        An Aggregator of the rows of a process, with leaves `(k, ...)`, and with the state of
        `aggregator`. In `jd.grad`, gradients of heads (`jd.multitask`) are means over processes.

    Raises:
        TypeError: If `aggregator` is not an Aggregator.
        ValueError: As for `jd.distributed.data_parallel`; or if there are too few rows.
        RuntimeError: As for `jd.distributed.data_parallel`.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> median = jd.distributed.across_workers(jd.trimmed_mean(1))
        >>> median(torch.tensor([[1.0, 2.0], [2.0, 1.0], [torch.nan, -1e30]]))[0]
        tensor([2., 1.])
        >>> dist.destroy_process_group()
    """
    _check.combinable("across_workers", aggregator, (Aggregator,))
    _collectives.valid(group)
    _check.flag("check", check)
    return spread(aggregator, f"across_workers({aggregator.name})", STACK, group, check)


def _count(k: int, group: Group) -> int:
    """Return the number of rows of all processes."""
    return k * _collectives.size(group)


def _weights(weights: Tensor, group: Group) -> Tensor:
    """Return the weights of the rows of this process."""
    return weights.chunk(_collectives.size(group))[_collectives.rank(group)]


def _shares(like: Tensor, present: Tensor | None, size: Size, group: Group) -> Shares:
    """Return which rows there are; those of this process are taken as they are."""
    here = counted(like, present, size)
    return Shares(here, _collectives.all_gather(here, group), like)


STACK = Exchange(
    _count,
    _collectives.all_gather,
    _collectives.all_gather,
    _collectives.all_to_all,
    _weights,
    _shares,
    trusted=False,
)
