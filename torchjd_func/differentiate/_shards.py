"""Objectives of parameters of which each process keeps a part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchjd_func import _tree
from torchjd_func._types import Aggregator

PyTree = Any
Route = Callable[[_tree.Groups], tuple[Tensor, Callable[[Tensor], PyTree]]]
Leafwise = Callable[[list[Tensor]], list[Tensor]]


class Shards(NamedTuple):
    """Parameters, leaf by leaf, of which this rank keeps a part."""

    whole: list[Tensor]  # the leaves, gathered
    own: Leafwise  # gradients by them, or rows of such -> this rank's parts of means over ranks
    wrap: Leafwise  # parts, or their rows, placed as the leaves are
    mean: Callable[[Tensor], Tensor]  # of the losses, over ranks
    contract: Callable[[Route, _tree.Groups], tuple[Tensor, Callable[[Tensor], PyTree]]]
    by_rows: Callable[[Aggregator], Callable[..., tuple[PyTree, Any]]]  # the rule, on placed rows


def as_it_is(x: Any) -> Any:
    """Return what is given."""
    return x


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Sharded:
    """An objective of whole parameters and of a part of the batch.

    Attributes:
        fn: The objective on one rank.
        shards: `leaves -> Shards` of the differentiated argument.
        like: `leaf -> placeholder` of the whole leaf, without its memory.
    """

    fn: Callable[..., Any]
    shards: Callable[[list[Tensor]], Shards]
    like: Callable[[Tensor], Tensor]

    def __call__(self, *args: Any) -> Any:
        """Return the losses of this rank, of whole parameters."""
        return self.fn(*args)

    def __repr__(self) -> str:
        """Return the inner objective in one line."""
        return f"Sharded({getattr(self.fn, '__name__', repr(self.fn))})"
