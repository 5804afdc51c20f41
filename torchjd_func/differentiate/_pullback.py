"""One forward pass of an objective, and the linear map that pulls weights back to parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from torchjd_func import _check, _tree
from torchjd_func._pack import pack

PyTree = Any
_EXPLAINED = (
    *(RuntimeError, TypeError, ValueError),
    *(AttributeError, LookupError, AssertionError),
)


def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function of the user; of known mistakes say what to do."""
    if torch.compiler.is_compiling():
        return fn(*args, **kwargs)
    try:
        return fn(*args, **kwargs)
    except _EXPLAINED as error:
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


def vjp_aux(fn: Callable[..., Any], primals: PyTree) -> tuple[Any, Callable[[Any], Any], Any]:
    """Return the value of `fn`, its pullback, and its auxiliary output."""
    packed, unpack = packing(fn)
    result: Any = torch.func.vjp(packed, primals, has_aux=True)
    value, pullback, tensors = result
    return value, lambda cotangent: pullback(cotangent)[0], unpack(tensors)


def vjp_nested(
    fn: Callable[..., Any],
    primals: list[Tensor],
    places: tuple[int, ...],
    look: Callable[[Any, Callable[[Any], list[Tensor]]], Any],
) -> tuple[Any, Callable[[Any], list[Tensor]], Any, Any]:
    """Look at the pullback to some primals, inside what is pulled back to all of them once.

    Args:
        fn: `primals -> (value, aux)`.
        primals: Where to evaluate it.
        places: Some of the primals.
        look: `(value, pullback to these) -> what is to be known of them`.

    Returns:
        The value, the pullback to all primals, `aux`, and what was seen.
    """

    def outer(primals: list[Tensor]) -> tuple[Any, Any]:
        some = [primals[place] for place in places]
        value, pull, aux = vjp_aux(lambda some: fn(replaced(primals, places, some)), some)
        return value, (aux, look(value, pull))

    value, pull, (aux, seen) = vjp_aux(outer, primals)
    return value, pull, aux, seen


def replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """Return values with others in some places."""
    values = list(values)
    for place, other in zip(places, others, strict=True):
        values[place] = other
    return values


def reached(
    outs: Sequence[Tensor], handles: Sequence[Tensor], around: Mapping[Any, Sequence[Any]] = {}
) -> set[int]:
    """Return which handles autograd reaches, past nodes that stand for others; not in a graph."""
    number = {id(handle): leaf for leaf, handle in enumerate(handles)}
    return {number[place] for place in origins(outs, around) if place in number}


def origins(outs: Sequence[Tensor], around: Mapping[Any, Sequence[Any]] = {}) -> dict[int, Tensor]:
    """Return the leaves of autograd that tensors are, or depend on, by identity.

    Args:
        outs: The tensors.
        around: Nodes that are passed by, with those that come next.
    """
    found = {id(x): x for x in outs if x.grad_fn is None}
    seen: set[Any] = set()
    ahead: list[Any] = [x.grad_fn for x in outs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in around:
            ahead.extend(around[node])
            continue
        parents = node.next_functions
        if parents:
            ahead.extend([parent for parent, _ in parents])
        elif hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
    return found


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
        places = [place for place, x in enumerate(flat) if differentiable(x)]

        def run(some: list[Tensor]) -> Any:
            """Return anything, and all results."""
            with _Unhooked():
                return some[0].sum(), fn(*rebuild(replaced(flat, places, tracked(some))))

        result: Any = torch.func.vjp(run, [flat[place] for place in places], has_aux=True)
        return result[2]

    return nested


class _Unhooked(TorchFunctionMode):
    """Refuses hooks, which are called in derivatives of the innermost level alone."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        _check.not_hooked(func is Tensor.register_hook)
        return func(*args, **(kwargs or {}))


def differentiable(x: Any) -> bool:
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
    if scale is None:
        return pullback
    return lambda cotangent: unscaled(pullback(enlarged(cotangent, scale)), scale)


def unscaled(tree: PyTree, scale: Tensor | None) -> PyTree:
    """Undo the scale of all leaves, if there is one."""
    return tree if scale is None else _tree.map(partial(enlarged, scale=1 / scale), tree)


def enlarged(leaf: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply a leaf by a scale, if there is one, in its own dtype."""
    return leaf if scale is None else scale.to(leaf.dtype) * leaf
