"""Objectives of parameters of which each process keeps a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._shares import order, same, scaled, step_of
from torchjd_func._types import Aggregator
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layerwise import Ranks, count
from torchjd_func.differentiate._linearized import (
    Contraction,
    Groups,
    Jacobian,
    Leaves,
    Linearized,
    Shards,
)
from torchjd_func.differentiate._numbered import numbered
from torchjd_func.differentiate._objective import Function, Objective, as_objective, shown
from torchjd_func.differentiate._pullback import basis, pull_rows
from torchjd_func.differentiate._request import Request, bind, chosen

PyTree = Any
Leafwise = Callable[[list[Tensor]], list[Tensor]]


class Parts(NamedTuple):
    """Parameters, leaf by leaf, of which this process keeps a part."""

    own: Leafwise  # gradients by them, or rows of such -> this process's parts of the means
    wrap: Leafwise  # parts, or their rows, placed as the leaves are
    mean: Callable[[Tensor], Tensor]  # of the losses, over processes
    shares: Callable[..., Any]  # (losses, present, size) -> what this process has of each loss
    agree: Callable[[PyTree], Callable[[PyTree], PyTree]]  # as `_handshake.agreed`
    ranks: Ranks  # who has the other examples of an instance-wise objective
    contract: Callable[[Contraction, Groups], tuple[Tensor, Callable[[Tensor], PyTree]]]
    by_rows: Callable[[Aggregator], Callable[..., tuple[PyTree, Any]]]  # the rule, on placed rows
    some: Callable[[Sequence[int]], Any]  # the same for some of the leaves


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Sharded:
    """An objective of whole parameters and of a part of the batch.

    Attributes:
        fn: The objective on one process.
        parts: `leaves -> Parts` of the differentiated argument.
        gather: `leaves -> whole leaves`.
        like: `leaf -> placeholder` of the whole leaf, without its memory.
    """

    fn: Objective
    parts: Callable[[list[Tensor]], Parts]
    gather: Leafwise
    like: Callable[[Tensor], Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the losses of this process, of whole parameters."""
        return self.fn(*args, **kwargs)

    def linearize(self, request: Request) -> Linearized:
        """Differentiate by whole parameters; of gradients this process keeps its parts."""
        fn = self.fn
        if not isinstance(fn, InstanceWise):
            _check.shards_route(request.route)
        everything = bind(request._replace(where=None))
        parts = self.parts(everything.leaves)
        whole = request._replace(args=everything.fill(self.gather(everything.leaves)))
        if request.alone and request.where is not None:
            parts = parts.some(chosen(request.where, everything.paths))
        if isinstance(fn, InstanceWise):
            with numbered():
                linear = replace(fn, ranks=parts.ranks).linearize(whole)
            return linear._replace(leaves=_placed(linear.leaves, parts))
        with numbered():
            linear = fn.linearize(whole)
        return _shared_out(linear, parts, request)

    def wrap(self, change: Callable[[Function], Function]) -> Sharded:
        """Return the sharded objective of the changed function."""
        return replace(self, fn=as_objective(self.fn.wrap(change)))

    def rows_like(self, primals: PyTree, m: int) -> PyTree:
        """Return placeholders for the rows of whole parameters."""
        parts = self.parts(_tree.leaves(primals))
        if isinstance(self.fn, InstanceWise):
            m = count(m, primals, parts.ranks)
        else:
            parts.agree(same("parameters", primals))
        return self.fn.rows_like(_tree.map(self.like, primals), m)

    def plan(self, request: Request) -> None:
        """Remember nothing."""

    @property
    def spans_processes(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Sharded({shown(self.fn)})"


def _placed(leaves: Leaves, parts: Parts) -> Leaves:
    """Return leaves that are put back with their places."""
    return Leaves(leaves.paths, lambda own: leaves.rebuild(parts.wrap(list(own))))


def _shared_out(linear: Linearized, parts: Parts, request: Request) -> Linearized:
    """Return means over processes, of which this process has its parts."""
    present, part, seen = linear.present, request.part, linear.seen
    part = part._replace(losses=order(linear.losses))
    paths = repr(linear.leaves.paths)
    after = parts.agree(step_of(part, present, losses=linear.vector, order=paths))

    def agreed(cotangent: Tensor) -> list[Tensor]:
        """Pull back once all processes agree."""
        return linear.jacobian.pullback(after(cotangent))

    pull = agreed
    known = [] if seen is None or seen.rows is None else seen.rows
    vector, known = after((linear.vector, known))
    if present is not None or part.size is not None:
        shares = parts.shares(vector, present, part.size)
        vector, known = scaled((vector, known), shares)
        pull, present = partial(_pull_share, pull, shares.factors), shares.anywhere
    vector = parts.mean(vector)

    def rows() -> list[Tensor]:
        """Pull back, and scatter each chunk of rows at once."""
        return pull_rows(pull, basis(linear.vector), request.chunk_size, parts.own)

    seen_parts = parts
    if seen is not None and seen.rows is not None:
        seen_parts = parts.some(seen.places)
        seen = seen._replace(rows=seen_parts.own(known))
    return linear._replace(
        losses=_tree.unravel(linear.losses, vector),
        vector=vector,
        present=present,
        leaves=_placed(linear.leaves, parts),
        jacobian=Jacobian(lambda weights: parts.own(pull(weights)), rows),
        seen=seen,
        shards=Shards(parts.contract, partial(_contract_seen, seen_parts.contract), parts.by_rows),
    )


def _pull_share(
    pull: Callable[[Tensor], list[Tensor]], factors: Tensor, cotangent: Tensor
) -> list[Tensor]:
    """Pull the share of this process back; zeros of nothing, where a product may be no number."""
    own = cotangent * factors.to(cotangent.dtype)
    return [torch.where((own != 0).any(), leaf, 0) for leaf in pull(own)]


def _contract_seen(
    contract: Callable[[Contraction, Groups], tuple[Tensor, Any]], rows: list[Tensor]
) -> Tensor:
    """Return the Gramian of rows of which each process has parts."""

    def route(groups: Groups) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
        return _tree.gramians(_tree.blocks(rows, groups), groups), lambda weights: weights

    return contract(route, (tuple(range(len(rows))),))[0][0]
