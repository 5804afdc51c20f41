"""Leaves of a pytree as one matrix for each dtype, with the columns in the processes' order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func._types import PyTree


class Block(NamedTuple):
    """Leaves of one dtype; each group has the same number of columns on every process."""

    places: tuple[tuple[int, ...], ...]  # the leaves of each group, by their place in leaf order
    widths: list[int]  # the columns that a process has of each group


def blocks(flat: list[Tensor], groups: _tree.Groups, world: int) -> list[Block]:
    """Plan a block for each dtype of `flat`, the leaves `(k, ...)` of a Jacobian."""
    found = []
    for dtype in dict.fromkeys(leaf.dtype for leaf in flat):
        places = tuple(tuple(i for i in group if flat[i].dtype == dtype) for group in groups)
        sizes = [sum(_width(flat[i]) for i in group) for group in places]
        found.append(Block(places, [-(-size // world) for size in sizes]))
    return found


def matrix(block: Block, flat: list[Tensor], world: int) -> Tensor:
    """Return the rows of leaves, `(k, world * sum(widths))`, filled up with zeros."""
    parts = []
    for places, width in zip(block.places, block.widths, strict=True):
        if places:
            rows = torch.cat([_tree.matrix(flat[i]) for i in places], dim=1)
            rows = torch.nn.functional.pad(rows, (0, world * width - rows.shape[1]))
            parts.append(rows.reshape(len(rows), world, width))
    return torch.cat(parts, dim=2).flatten(1)


def leaves(block: Block, rows: Tensor, like: list[Tensor], world: int) -> dict[int, Tensor]:
    """Return the leaves `(k, ...)` of rows `(k, world * sum(widths))`; undoes `matrix`."""
    found: dict[int, Tensor] = {}
    parts = rows.reshape(len(rows), world, -1).split(block.widths, dim=2)
    for places, part in zip(block.places, parts, strict=True):
        sizes = [_width(like[i]) for i in places]
        whole = part.flatten(1)[:, : sum(sizes)]
        for i, own in zip(places, whole.split(sizes, dim=1) if places else (), strict=True):
            shaped = own.reshape(len(own), *_tree.real_shape(like[i])[1:])
            found[i] = torch.view_as_complex(shaped) if like[i].is_complex() else shaped
    return found


def transfer(jac: PyTree, fn: Callable[[Tensor], Tensor]) -> PyTree:
    """Apply `fn`, from `(k, n)` to `(m, n)`, to the rows of `jac`, once for each dtype."""
    flat, rebuild = _tree.flatten(jac)
    found: dict[int, Tensor] = {}
    for block in blocks(flat, (tuple(range(len(flat))),), 1):
        found.update(leaves(block, fn(matrix(block, flat, 1)), flat, 1))
    return rebuild(_tree.in_order(found))


def _width(leaf: Tensor) -> int:
    """Return the number of columns of a leaf `(k, ...)`; a complex one counts twice."""
    return leaf.shape[1:].numel() * (2 if leaf.is_complex() else 1)
