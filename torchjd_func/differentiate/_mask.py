"""Losses as one vector, without those that this batch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree

PyTree = Any
Flags = list[bool | Tensor]


def masked(losses: PyTree, present: Any) -> tuple[Tensor, Tensor | None]:
    """Return the losses as one vector, zeros for those that are absent, and which there are."""
    if present is None:
        return _tree.ravel(losses), None
    flat = [leaf.reshape(-1) for leaf in _tree.leaves(losses)]
    flags = _flags(losses, present, [leaf.numel() for leaf in flat])
    # A constant in the place of a loss that is known to be absent: no pull-back goes through it.
    pairs = list(zip(flags, flat, strict=True))
    vector = _tree.ravel([torch.zeros_like(x) if flag is False else x for flag, x in pairs])
    mask = _tree.ravel([_expanded(flag, x) for flag, x in pairs])
    return torch.where(mask, vector, 0), mask


def all_absent(present: Any) -> bool:
    """Say whether Python bools rule out each loss of a (sub)tree."""
    flags = _tree.leaves(present)
    return present is not None and bool(flags) and all(flag is False for flag in flags)


def _flags(losses: PyTree, present: Any, sizes: list[int]) -> Flags:
    """Return a bool, or a tensor of bools, for each leaf of the losses."""
    given = _tree.leaves(present)
    alike = _tree.same_structure(losses, present)
    in_order = isinstance(present, list | tuple) and len(given) == len(sizes)
    if (alike or in_order) and all(map(_fits, given, sizes)):
        return given
    _check.like_losses(present, losses, alike or isinstance(present, Tensor | list | tuple))
    device = _tree.leaves(losses)[0].device
    mask = _present.as_mask("a transformed function", present, sum(sizes), device)
    assert mask is not None
    return list(mask.split(sizes))


def _fits(flag: Any, size: int) -> bool:
    """Say whether a flag counts for all losses of a leaf, or there is one for each."""
    if isinstance(flag, Tensor):
        return flag.dtype == torch.bool and flag.numel() in (1, size)
    return isinstance(flag, bool)


def _expanded(flag: bool | Tensor, leaf: Tensor) -> Tensor:
    """Return a flag for each loss of a leaf."""
    if isinstance(flag, Tensor):
        return flag.reshape(-1).to(leaf.device).expand(leaf.shape)
    return torch.full(leaf.shape, flag, device=leaf.device)
