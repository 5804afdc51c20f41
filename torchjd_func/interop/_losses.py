"""The losses of a batch, as tensors of plain autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func.interop._autograd import Pull

PyTree = Any


class Batch(NamedTuple):
    """What is known of the losses of a batch."""

    vector: Tensor  # (m,), detached
    paths: list[str]  # the name of each of the m
    pulls: list[Pull]  # of those that are present
    present: Tensor | None  # (m,) bool
    zeros: bool  # whether what no present loss depends on gets zeros
    scale: Tensor | None  # () by which cotangents are scaled


def batch_of(losses: PyTree, name: str, present: Any, scaler: Any, *, empty: bool = False) -> Batch:
    """Read the losses of a batch, and which of them are present; none of one without examples."""
    paths, leaves = _tree.paths(losses), _tree.leaves(losses)
    _check.losses(paths, leaves)
    vector = _tree.ravel([leaf.detach() for leaf in leaves])
    mask = _present.as_mask(name, present, len(vector), vector.device)
    here = [True] * len(vector) if mask is None else mask.tolist()
    scale = None if scaler is None else scaler.scale(vector.new_ones((), dtype=torch.float32))
    names, pulls = [], []
    for path, leaf in zip(paths, leaves, strict=True):
        for index in range(leaf.numel()):
            if here[len(names)] and not empty:
                _check.reaches("losses", path, leaf.requires_grad)
                pulls.append(Pull(len(names), [leaf], [_basis(leaf, index, scale)]))
            names.append(path)
    by_bools = all(isinstance(flag, bool) for flag in _tree.leaves(present))
    return Batch(vector, names, pulls, mask, mask is not None and not by_bools, scale)


def _basis(leaf: Tensor, index: int, scale: Tensor | None) -> Tensor:
    """Return the cotangent of one number of a tensor."""
    cotangent = leaf.new_zeros(leaf.numel())
    cotangent[index] = 1 if scale is None else scale
    return cotangent.reshape(leaf.shape)
