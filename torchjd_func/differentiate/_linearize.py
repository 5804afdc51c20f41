"""Linearize an objective in the way that its structure asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._accumulate import Accumulated
from torchjd_func.differentiate._layered import linearize_layers
from torchjd_func.differentiate._layerwise import Spelled
from torchjd_func.differentiate._objectives import InstanceWise, MultiTask, is_gathered
from torchjd_func.differentiate._pullback import (
    Linearized,
    as_they_are,
    as_vector,
    basis,
    bind,
    pull_rows,
    split_aux,
    vjp_aux,
)
from torchjd_func.differentiate._scaled import Scaled, multiplied, scale_by
from torchjd_func.differentiate._shards import Sharded
from torchjd_func.differentiate._shared import linearize_multitask

PyTree = Any


def linearize(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    route: str = "jacobian",
) -> Linearized:
    """Run the objective once and keep what is needed to pull cotangents back."""
    if isinstance(fn, MultiTask):
        return linearize_multitask(fn, args, argnums, has_aux, route)
    if isinstance(fn, Scaled):
        return _linearize_scaled(fn, args, argnums, has_aux)
    if isinstance(fn, Accumulated):
        return _linearize_accumulated(fn, args, argnums, has_aux)
    primals, call = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    paths = _tree.paths(primals)
    _check.params(f"argument {argnums}", paths, flat)
    if isinstance(fn, Sharded):
        return _linearize_sharded(fn, args, argnums, has_aux, route)
    if is_layered(fn, route):
        return linearize_layers(fn, args, argnums, has_aux)

    def from_leaves(leaves: list[Tensor]) -> tuple[Tensor, tuple[PyTree, PyTree]]:
        """Return the losses as one vector, for torch.func to differentiate."""
        with Spelled():
            losses, aux = split_aux(call(rebuild(leaves)), has_aux)
        return as_vector(fn, losses), (losses, aux)

    vector, pull, (losses, aux) = vjp_aux(from_leaves, flat)
    return Linearized(vector, losses, aux, lambda c: pull(c)[0], rebuild, as_they_are, paths)


def is_layered(fn: Callable[..., Any], route: str) -> bool:
    """Say whether a route linearizes an objective layer by layer."""
    automatic = route == "auto" and isinstance(fn, InstanceWise)
    return route == "layerwise" or automatic or is_gathered(fn)


def _linearize_accumulated(
    fn: Accumulated, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Differentiate one microbatch after the other, and keep the sum of the Jacobians."""
    _check.choice("has_aux", has_aux, (fn.has_aux,))
    parts, total = [], None
    for arguments in fn.split(args):
        part, rows = _microbatch(fn, arguments, argnums, has_aux)
        total = rows if total is None else _tree.map(torch.add, total, rows)
        parts.append(part)
    jacobian = _tree.map(lambda leaf: leaf / fn.n, total)
    return Linearized(
        _tree.mean([part.vector for part in parts]),
        _tree.mean([part.losses for part in parts]),
        _tree.stack([part.aux for part in parts]),
        lambda weights: _tree.weighted_sum(jacobian, weights),
        parts[0].rebuild,
        parts[0].assemble,
        parts[0].paths,
        heads=_tree.mean([part.heads for part in parts]),
    )


def _linearize_scaled(
    fn: Scaled, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Differentiate larger losses, and undo the scale of all that comes out."""
    _check.not_gathered("jd.loss_scale", is_gathered(fn.fn))
    _check.plain("jd.loss_scale", fn.fn, (Sharded,), "Use bfloat16.")
    large = linearize(multiplied(fn.fn, fn.scale, has_aux), args, argnums, has_aux)
    down = partial(scale_by, 1 / fn.scale)
    return Linearized(
        down(large.vector),
        down(large.losses),
        large.aux,
        lambda cotangent: down(large.pullback(cotangent)),
        large.rebuild,
        large.assemble,
        large.paths,
        heads=down(large.heads),
    )


def _linearize_sharded(
    fn: Sharded, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool, route: str
) -> Linearized:
    """Differentiate by whole parameters; of gradients this rank keeps its parts."""
    _check.shards_route(route)
    primals, call = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    shards = fn.shards(flat)
    linear = linearize(call, (rebuild(shards.whole),), 0, has_aux)
    vector = shards.mean(linear.vector)
    return linear._replace(
        vector=vector,
        losses=_tree.unravel(linear.losses, vector),
        own=shards.own,
        rebuild=lambda leaves: rebuild(shards.wrap(leaves)),
        shards=shards,
    )


def _microbatch(
    fn: Accumulated, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> tuple[Linearized, PyTree]:
    """Return what is kept of a microbatch, and its Jacobian; the graph is freed on return."""
    part = linearize(fn.fn, args, argnums, has_aux)
    rows = pull_rows(part.pullback, basis(part.vector), fn.chunk_size)
    return part._replace(pullback=_freed), rows


def _freed(cotangent: Tensor) -> list[Tensor]:
    """Stand for the pullback of a graph that is gone."""
    raise AssertionError(cotangent)
