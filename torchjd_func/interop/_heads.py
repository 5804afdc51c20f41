"""Heads of several tasks apart from the parameters that they share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.interop._autograd import Pull, ancestry, edge_of, gradient
from torchjd_func.interop._losses import Batch
from torchjd_func.interop._targets import shared_part

PyTree = Any
Grads = list[tuple[Tensor, Tensor | None]]


class Split(NamedTuple):
    """A multi-task problem at its features."""

    pulls: list[Pull]  # of the features, for each loss
    heads: Grads  # all parameters of heads with their gradients
    shared: PyTree  # the parameters that the features depend on
    sources: dict[int, Tensor]  # all leaves that losses depend on, by identity


def no_heads(batch: Batch, tree: PyTree) -> Split:
    """Return a problem all of whose parameters are shared."""
    params = {id(param) for param in _tree.leaves(tree)}
    sources: dict[int, Tensor] = {}
    for pull in {id(pull.outputs[0]): pull for pull in batch.pulls}.values():
        below = ancestry(pull.outputs).leaves
        _check.reaches("losses", batch.paths[pull.place], not params.isdisjoint(below))
        sources |= below
    return Split(batch.pulls, [], tree, sources)


def split(
    features: PyTree, batch: Batch, target: PyTree, tree: PyTree, factors: Tensor | None
) -> Split:
    """Differentiate each loss by its head, times a factor, and by the features, each head once."""
    flat = _features(features)
    params, below = _tree.leaves(tree), ancestry(flat).leaves
    shared = [param for param in params if id(param) in below]
    _check.reaches("features", "", bool(shared))
    totals: dict[int, Tensor] = {}
    pulls, sources = [], dict(below)
    for pull in batch.pulls:
        above = ancestry(pull.outputs, flat).leaves
        _check.apart(batch.paths[pull.place], any(id(param) in above for param in shared))
        sources |= above
        own = [param for param in params if id(param) in above]
        found = gradient(pull.outputs, pull.cotangents, [*flat, *own], True)
        reached = any(grad is not None for grad in found)
        _check.reaches("losses", batch.paths[pull.place], reached)
        for param, grad in zip(own, found[len(flat) :], strict=True):
            if grad is not None:
                grad = grad if factors is None else grad * factors[pull.place].to(grad.dtype)
                totals[id(param)] = totals[id(param)] + grad if id(param) in totals else grad
        pairs = [(out, grad) for out, grad in zip(flat, found, strict=False) if grad is not None]
        pulls.append(Pull(pull.place, [out for out, _ in pairs], [grad for _, grad in pairs]))
    heads = [(param, totals.get(id(param))) for param in params if id(param) not in below]
    kept = _tree.map(lambda param: param if id(param) in below else None, tree)
    pulls = [pull for pull in pulls if pull.outputs]
    return Split(pulls, heads, shared_part(target, kept), sources)


def _features(features: PyTree) -> list[Tensor]:
    """Return the features, after a check that each stands for a way of its own."""
    paths, flat = _tree.paths(features), _tree.leaves(features)
    _check.features(paths, flat)
    for path, leaf in zip(paths, flat, strict=True):
        _check.reaches("features", path, leaf.requires_grad)
        before = ancestry([leaf]).edges
        ways = [edge_of(other) for other in flat if other is not leaf]
        _check.independent_feature(path, not any(way in before for way in ways))
    return flat
