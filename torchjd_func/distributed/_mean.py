"""Sums and means over processes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._shares import Part, Shares, Size, scaled, shares_of, step_of
from torchjd_func._types import PyTree
from torchjd_func.distributed import _collectives, _handshake, _layout
from torchjd_func.distributed._collectives import Group


def mean(tree: PyTree, group: Group = None, *, size: Size = None, check: bool = True) -> PyTree:
    r"""Average a pytree over processes: one all-reduce for each dtype.

    $$\bar x = \frac1W \sum_{r=1}^W x_r, \qquad\text{or, with } b_r \text{ examples on process } r,
    \qquad \bar x = \frac{\sum_r b_r x_r}{\sum_r b_r}.$$

    For what `jd.grad` leaves local: the losses that it returns, the gradient of a loss that was
    differentiated by hand, statistics of a BatchNorm.

    Args:
        tree: Pytree of floating-point tensors, of the same shapes on each process.
        group: The processes; by default all.
        size: How many examples this process has: an int or a 0-d tensor, on all processes or on
            none. Of a process without examples `tree` may hold anything, NaN too.
        check: Whether to compare names, shapes and dtypes before, by one small all-reduce.

    Returns:
        The mean in the structure and the dtypes of `tree`, the same on each process; a constant of
        derivatives. Zeros if no process has an example.

    Raises:
        TypeError: If a leaf is not a floating-point tensor.
        ValueError: On all processes, if they have other names, shapes or dtypes.
        RuntimeError: If another process has ended, naming this process and the collective.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> jd.distributed.mean({"loss": torch.tensor(2.0)})
        {'loss': tensor(2.)}
        >>> dist.destroy_process_group()
    """
    _collectives.valid(group)
    _check.flag("check", check)
    _collectives.size(group)  # checks that there is one
    remedy = "Convert counters, or leave them out."
    leaves = _tree.leaves(tree)
    _check.differentiable("`tree`", _tree.paths(tree), leaves, remedy)
    _check.size(size, True)
    tree = _handshake.agreed(step_of(Part(size), None, tree=tree), (group,), check)(tree)
    if size is None or not leaves:
        return average(tree, group)
    one = leaves[0].new_ones(1, dtype=torch.float64)
    rows = scaled(_tree.map(lambda leaf: leaf.unsqueeze(0), tree), shares(one, None, size, group))
    return _tree.map(lambda leaf: leaf.squeeze(0), average(rows, group))


def shares(like: Tensor, present: Tensor | None, size: Size, group: Group) -> Shares:
    """Return what this process has of each objective `(k,)` that all processes share."""
    add = partial(_collectives.all_reduce, group=group)
    return shares_of(like, present, size, _collectives.size(group), add)


def average(tree: PyTree, group: Group) -> PyTree:
    """Return the mean of a pytree over processes."""
    world = _collectives.size(group)
    return total(_tree.map(lambda leaf: leaf / world, tree), group)


def total(tree: PyTree, group: Group) -> PyTree:
    """Return the sum of a pytree over processes, with one all-reduce for each dtype."""
    if not _tree.leaves(tree):
        return tree
    rows = _tree.map(lambda leaf: leaf.unsqueeze(0), tree)
    sums = _layout.transfer(rows, partial(_collectives.all_reduce, group=group))
    return _tree.map(lambda leaf: leaf.squeeze(0), sums)


def share(rows: Tensor, group: Group) -> Tensor:
    """Return what a process adds to the mean."""
    return rows / _collectives.size(group)
