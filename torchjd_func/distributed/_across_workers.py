"""Rows of their own on several ranks, of which a rule makes one direction."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Aggregator
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._exchange import Exchange, spread


def across_workers(aggregator: Aggregator, group: Group = None) -> Aggregator:
    r"""Aggregate rows that are spread over ranks: usually one gradient of each worker.

    $$d = A(J), \qquad J = (g_1, \dots, g_W)^\top.$$

    Each rank has `k` rows of its own (one loss: `k = 1`), and `m = k W`, counted rank by rank. A
    robust rule such as `jd.krum` or `jd.trimmed_mean` gives a direction that the arbitrary rows of
    some workers move no further than the rule promises, also if they hold infinities or NaN: a row
    of weight 0 is left out. What is promised are rows: a worker that breaks the protocol, or hangs,
    stops all. All ranks get the same direction. With `present`, on all ranks or on none, a rank
    says which of its own rows there are.

    No rank has all rows: an all-to-all deals the columns out, partial Gramians are added up, and
    the direction is gathered. Numbers that a rank hands to collectives, with `n'` as for
    `jd.distributed.data_parallel`: `(k + 1) n' + m^2 + m`; without the square for
    `jd.trimmed_mean`; `n + m` for weights that look at no gradient; and `m n + m` for all others
    that need the rows, which are gathered on each rank.

    Args:
        aggregator: For the rows of all ranks.
        group: The ranks; by default all.

    Returns:
        An Aggregator of the rows of a rank, with leaves `(k, ...)`, and with the state of
        `aggregator`. In `jd.grad`, gradients of heads (`jd.multitask`) are plain means over ranks.

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
    return spread(aggregator, f"across_workers({aggregator.name})", STACK, group)


def _count(k: int, group: Group) -> int:
    """Return the number of rows of all ranks."""
    return k * _collectives.size(group)


def _weights(weights: Tensor, group: Group) -> Tensor:
    """Return the weights of the rows of this rank."""
    return weights.chunk(_collectives.size(group))[_collectives.rank(group)]


def _present(present: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return which rows there are of all ranks; those of this one are taken as they are."""
    return _collectives.all_gather(present, group), torch.ones_like(present)


STACK = Exchange(
    _count,
    _collectives.all_gather,
    _collectives.all_gather,
    _collectives.all_to_all,
    _weights,
    _present,
    trusted=False,
)
