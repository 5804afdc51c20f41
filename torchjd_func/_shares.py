"""What a process has of each objective, where several processes have parts of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree

PyTree = Any
Size = int | Tensor | None  # how many examples a process has; `None` if parts count alike


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """The length of a tensor, which is a number of the step that runs."""

    of: Tensor

    def __str__(self) -> str:
        """Return the length, for messages."""
        return f"{len(self.of)} rows"


@dataclass(frozen=True, eq=False, slots=True)
class Numbers:
    """A tensor that is to hold the same numbers on all processes, not its shape alone."""

    of: Tensor


def same(name: str, tree: PyTree) -> dict[str, Any]:
    """Return the leaves by name, whose numbers are to be the same; not those of sharded tensors."""
    plain = Tensor, torch.nn.Parameter
    pairs = zip(_tree.names(tree), _tree.leaves(tree), strict=True)
    return {
        f"{name}.{path}": Numbers(x) if type(x) in plain else _check.describe(x)
        for path, x in pairs
    }


def order(tree: PyTree) -> str:
    """Return the names of all leaves, in order."""
    return repr(_tree.paths(tree))


class Part(NamedTuple):
    """What one process has of a batch, and what it has like the others."""

    size: Size = None
    lengths: dict[str, Rows] | None = None  # of the tensors of the batch
    same: Mapping[str, Any] = {}  # what else is to be the same, by name
    losses: str = ""  # their names, in order


def step_of(part: Part, present: Any, **tensors: Any) -> dict[str, Any]:
    """Return what is to be the same on all processes in a step: shapes, and which options.

    Batches are of one length, unless all processes say how many examples they have.
    """
    options = {"present": present, "size": part.size}
    given = {name: "nothing" if x is None else "a value" for name, x in options.items()}
    batch = part.lengths if part.size is None else None
    return {**tensors, "names": part.losses, **part.same, "batch": batch, **given}


class Shares(NamedTuple):
    """What this process has of each objective."""

    here: Tensor  # (k,) bool, whether it has any
    anywhere: Tensor  # (m,) bool, whether any process has
    factors: Tensor  # (k,), of which sums over processes are weighted means


def shares_of(
    like: Tensor,
    present: Tensor | None,
    size: Size,
    world: int,
    add: Callable[[Tensor], Tensor],
) -> Shares:
    """Return shares whose mean over processes is that over those that have an objective, by size.

    `like` is `(k,)`, and `add` returns the sum over processes.
    """
    here = counted(like, present, size)
    examples = here.to(torch.float64) if size is None else here * _on(like, size)
    sums = add(examples)
    return Shares(here, sums > 0, world * examples / torch.where(sums > 0, sums, 1))


def counted(like: Tensor, present: Tensor | None, size: Size) -> Tensor:
    """Return which objectives `(k,)` this process has: none without examples."""
    here = torch.ones_like(like, dtype=torch.bool) if present is None else present
    return here if size is None else here & (_on(like, size) > 0)


def _on(like: Tensor, size: Size) -> Tensor:
    """Return a number of examples as a tensor where another one is."""
    return torch.as_tensor(size, device=like.device).to(torch.float64)


def scaled(tree: PyTree, shares: Shares) -> PyTree:
    """Return leaves `(k, ...)` by their factors, and 0 for what is absent."""

    def scale(leaf: Tensor) -> Tensor:
        kept = torch.where(_tree.per_row(shares.here, leaf), leaf, 0)
        return kept * _tree.per_row(shares.factors, leaf).to(leaf.dtype)

    return _tree.map(scale, tree)
