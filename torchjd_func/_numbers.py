"""Numbers that users give for objectives: a tensor, a list, or by the names of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _host, _tree

# A number for each objective, in leaf order of the losses, or by their names.
Numbers = Tensor | Sequence[float] | Mapping[str, Any]


class Named(NamedTuple):
    """Python numbers, a list or by the names of leaves, such as `{"edges": 2.0, "depth": 1.0}`."""

    names: tuple[str, ...]  # in leaf order; none of a list
    values: Tensor  # (m,)
    kept: dict[Any, Tensor]  # the same on other devices

    def at(self, like: Tensor) -> Tensor:
        """Return the numbers as `like`; those of another device are copied once, and kept."""
        if like.device == self.values.device or torch.compiler.is_compiling():
            return _host.to(self.values, like)
        place = like.device, like.dtype
        moved = self.kept[place] if place in self.kept else _host.to(self.values, like)
        if _host.resident(moved):  # not of a shape alone, nor of a transform
            self.kept[place] = moved
        return moved

    def __repr__(self) -> str:
        """Return the dict that they came in; only its keys where numbers cannot be read."""
        try:
            numbers = self.values.tolist()
        except RuntimeError:  # mapped by torch.func.vmap, or of a shape alone
            return f"dict of {', '.join(self.names)}"
        shown = [f"{name!r}: {x:.4g}" for name, x in zip(self.names, numbers, strict=True)]
        return f"{{{', '.join(shown)}}}"


def named(tree: Any) -> Named:
    """Return a tree of numbers as a vector, in leaf order, with the names of its leaves."""
    numbers = _tree.ravel([torch.as_tensor(x).double() for x in _tree.leaves(tree)])
    return Named(tuple(_tree.paths(tree)), numbers, {})
