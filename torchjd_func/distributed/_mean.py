"""Sums and means over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._types import PyTree
from torchjd_func.distributed import _collectives, _layout
from torchjd_func.distributed._collectives import Group


def mean(tree: PyTree, group: Group = None) -> PyTree:
    """Average a pytree over ranks: one all-reduce for each dtype.

    For what `jd.grad` leaves local: the losses that it returns, the gradient of a loss that was
    differentiated by hand, statistics of a BatchNorm.

    Args:
        tree: Pytree of floating-point tensors, of the same shapes on each rank.
        group: The ranks; by default all.

    Returns:
        The mean in the structure and the dtypes of `tree`, the same on each rank; a constant of
        derivatives.

    Raises:
        TypeError: If a leaf is not a floating-point tensor.
        RuntimeError: If another rank has ended, naming this rank and the collective.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> jd.distributed.mean({"loss": torch.tensor(2.0)})
        {'loss': tensor(2.)}
        >>> dist.destroy_process_group()
    """
    world = _collectives.size(group)
    remedy = "Convert counters, or leave them out."
    _check.differentiable("`tree`", _tree.paths(tree), _tree.leaves(tree), remedy)
    return total(_tree.map(lambda leaf: leaf / world, tree), group)


def total(tree: PyTree, group: Group) -> PyTree:
    """Return the sum of a pytree over ranks, with one all-reduce for each dtype."""
    if not _tree.leaves(tree):
        return tree
    rows = _tree.map(lambda leaf: leaf.unsqueeze(0), tree)
    sums = _layout.transfer(rows, partial(_collectives.all_reduce, group=group))
    return _tree.map(lambda leaf: leaf.squeeze(0), sums)


def everywhere(present: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return what is present on any process, and a factor for each objective of this one.

    It makes means over all processes, of what is 0 where it is absent, means over those that have
    the objective.
    """
    count = _collectives.all_reduce(present.to(torch.float64), group)
    return count > 0, _collectives.size(group) / count.clamp(min=1)


def scaled(tree: PyTree, present: Tensor, factors: Tensor) -> PyTree:
    """Return leaves `(k, ...)` by their factors `(k,)`, and 0 for what is absent."""

    def scale(leaf: Tensor) -> Tensor:
        kept = torch.where(_tree.per_row(present, leaf), leaf, 0)
        return kept * _tree.per_row(factors, leaf).to(leaf.dtype)

    return _tree.map(scale, tree)


def mean_of_heads(
    grads: Mapping[str, PyTree], group: Group, *, present: Tensor | None = None
) -> PyTree:
    """Average the gradients of heads, of which each belongs to one objective, by their names."""
    if present is None or not _tree.leaves(grads):
        return mean(grads, group)
    _, factors = everywhere(present, group)
    flags = zip(sorted(grads), present.split(1), factors.split(1), strict=True)
    rows = {
        name: scaled(_tree.map(lambda leaf: leaf.unsqueeze(0), grads[name]), flag, factor)
        for name, flag, factor in flags
    }
    return mean(_tree.map(lambda leaf: leaf.squeeze(0), rows), group)


def share(rows: Tensor, group: Group) -> Tensor:
    """Return what a rank adds to the mean."""
    return rows / _collectives.size(group)
