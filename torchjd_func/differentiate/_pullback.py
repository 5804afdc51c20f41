"""One forward pass of an objective, and the linear map that pulls weights back to parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func._pack import pack

PyTree = Any


def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function of the user; of known mistakes say what to do."""
    if torch.compiler.is_compiling():
        return fn(*args, **kwargs)
    try:
        return fn(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        given = (args, dict(kwargs))
        _check.explain(error, _tree.paths(given), _tree.leaves(given))


def as_it_is(x: Any) -> Any:
    """Return what is given."""
    return x


def pull_rows(
    pullback: Callable[[Any], Any],
    cotangents: PyTree,
    chunk_size: int | None,
    own: Callable[[Any], Any] = as_it_is,
) -> PyTree:
    """Pull `(k, ...)` cotangents back, `chunk_size` at a time; 1 is a loop, without vmap."""
    if chunk_size == 1:
        return _tree.stack([own(pullback(row)) for row in _tree.cut(torch.unbind, cotangents)])
    chunks = _tree.cut(lambda x: x.split(chunk_size or len(x)), cotangents)
    return _tree.cat([own(_mapped(pullback, chunk)) for chunk in chunks])


def _mapped(pullback: Callable[[Any], Any], cotangents: PyTree) -> PyTree:
    """Map a pullback over cotangents; where torch can pull back one alone, say what to do."""
    if torch.compiler.is_compiling():
        return vmap(pullback)(cotangents)
    try:
        return vmap(pullback)(cotangents)
    except RuntimeError as error:
        pullback(_tree.cut(torch.unbind, cotangents)[0])
        _check.unmapped(error)


def vjp(fn: Callable[..., Any], *primals: PyTree) -> tuple[Any, Callable[..., Any]]:
    """Return the value of `fn` and its pullback."""
    value, pullback = torch.func.vjp(lambda *args: fn(*tracked(args)), *primals)[:2]
    return value, pullback


def vjp_aux(fn: Callable[..., Any], primals: PyTree) -> tuple[Any, Callable[..., Any], Any]:
    """Return the value of `fn`, its pullback, and its auxiliary output."""
    packed, unpack = packing(fn)
    result: Any = torch.func.vjp(packed, primals, has_aux=True)
    value, pullback, tensors = result
    return value, pullback, unpack(tensors)


def tracked(primals: PyTree) -> PyTree:
    """Return what `torch.func` hands out so that a graph knows that it is tracked.

    What it does not know to be tracked is plain to it: then the backward of a custom
    `autograd.Function` is dropped in silence (torch 2.13).
    """
    if not torch.compiler.is_compiling():
        return primals
    return _tree.map(lambda x: x.view_as(x), primals)


def tracked_inside(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function, for a graph to map over examples.

    What `vmap` hands out does not say that it is tracked, unless it is tracked inside: a custom
    `autograd.Function`, which no graph maps, is then refused (torch 2.13).
    """
    if not torch.compiler.is_compiling():
        return fn

    def nested(*args: Any) -> Any:
        """Run inside a level of derivatives that nothing asks for."""
        flat, rebuild = _tree.flatten(args)
        places = [place for place, x in enumerate(flat) if _differentiable(x)]

        def run(some: list[Tensor]) -> Any:
            """Return anything, and all results."""
            known = dict(zip(places, tracked(some), strict=True))
            parts = [known.get(place, x) for place, x in enumerate(flat)]
            return some[0].sum(), fn(*rebuild(parts))

        result: Any = torch.func.vjp(run, [flat[place] for place in places], has_aux=True)
        return result[2]

    return nested


def _differentiable(x: Any) -> bool:
    """Say whether `torch.func` takes derivatives by a value."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def packing(
    fn: Callable[..., Any],
) -> tuple[Callable[..., Any], Callable[[list[Tensor]], Any]]:
    """Make `fn` return its auxiliary output as a list of tensors, all that torch.func takes.

    Returns:
        The changed function, and the function that undoes it once the first has run.
    """
    restore: list[Callable[[list[Tensor]], Any]] = []

    def packed(primals: PyTree) -> tuple[Any, list[Tensor]]:
        """Return the value, and the tensors of the auxiliary output."""
        value, aux = fn(tracked(primals))
        tensors, unpack = pack(aux)
        restore.append(unpack)
        return value, tensors

    return packed, lambda tensors: restore[0](tensors)


def basis(vector: Tensor) -> Tensor:
    """Return the `(m, m)` identity, one cotangent for each loss."""
    return torch.eye(vector.shape[0], dtype=vector.dtype, device=vector.device)


def scaled(
    pullback: Callable[[Tensor], list[Tensor]], scale: Tensor | None
) -> Callable[[Tensor], list[Tensor]]:
    """Return the same map, run on numbers that are `scale` times as large."""
    return pullback if scale is None else partial(_pull_scaled, pullback, scale)


def _pull_scaled(
    pullback: Callable[[Tensor], list[Tensor]], scale: Tensor, cotangent: Tensor
) -> list[Tensor]:
    """Pull a larger cotangent back, and undo its scale."""
    return unscaled(pullback(times(scale, cotangent)), scale)


def unscaled(tree: PyTree, scale: Tensor | None) -> PyTree:
    """Undo the scale of all leaves, if there is one."""
    return tree if scale is None else _tree.map(partial(times, 1 / scale), tree)


def times(scale: Tensor, leaf: Tensor) -> Tensor:
    """Multiply a leaf in its own dtype."""
    return scale.to(leaf.dtype) * leaf
