"""One forward pass of an objective, and the linear map that pulls weights back to parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func.differentiate._layerwise import Layers
from torchjd_func.differentiate._objectives import InstanceWise
from torchjd_func.differentiate._shards import Leafwise, Shards, as_it_is

PyTree = Any


class Linearized(NamedTuple):
    """An objective at one point."""

    vector: Tensor  # (m,): the losses, in leaf order
    losses: PyTree  # the losses in the user's structure
    aux: PyTree  # what the objective returned beside its losses
    pullback: Callable[[Tensor], list[Tensor]]  # (m,) -> leaves of J^T weights
    rebuild: Callable[[list[Tensor]], PyTree]  # leaves -> the pytree whose Jacobian is aggregated
    assemble: Callable[..., PyTree]  # it, heads, weights or None -> grads of the argument
    paths: list[str]  # the names of its leaves
    layers: Layers | None = None  # what layer-by-layer routes recorded
    heads: PyTree = ()  # gradients of what one loss alone has
    shards: Shards | None = None  # who has the other columns
    own: Leafwise = as_it_is  # what was pulled back, or rows of such -> this rank's


def bind(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...]
) -> tuple[PyTree, Callable[[PyTree], Any]]:
    """Return the differentiated argument(s), and `fn` as a function of them alone."""
    positions = _check.argnums(argnums, len(args))

    def call(primals: PyTree) -> Any:
        """Put the differentiated arguments back in their places."""
        values = primals if isinstance(argnums, tuple) else (primals,)
        filled = list(args)
        for position, value in zip(positions, values, strict=True):
            filled[position] = value
        return fn(*filled)

    chosen = tuple(args[position] for position in positions)
    return (chosen if isinstance(argnums, tuple) else chosen[0]), call


def split_aux(out: Any, has_aux: bool) -> tuple[PyTree, PyTree]:
    """Separate the losses from the auxiliary output, which is `()` if there is none."""
    losses, aux = _check.aux_pair(out) if has_aux else (out, ())
    _check.losses(_tree.paths(losses), _tree.leaves(losses))
    return losses, aux


def as_vector(fn: Callable[..., Any], losses: PyTree) -> Tensor:
    """Return all losses as one vector; those of an instance-wise objective already are."""
    if isinstance(fn, InstanceWise) and not (isinstance(losses, Tensor) and losses.ndim == 1):
        name, remedy = "`losses` of an instance-wise objective", "Return one for each example."
        _check.fail(ValueError, name, "have shape (b,)", _check.describe(losses), remedy)
    return _tree.ravel(losses)


def pull_rows(
    pullback: Callable[[Tensor], Any],
    cotangents: Tensor,
    chunk_size: int | None,
    own: Callable[[Any], Any] = as_it_is,
) -> PyTree:
    """Pull `(k, m)` cotangents back, `chunk_size` at a time; 1 is a loop, without vmap."""
    if chunk_size == 1:
        return _tree.stack([own(pullback(row)) for row in cotangents.unbind()])
    chunks = cotangents.split(chunk_size or len(cotangents))
    return _tree.cat([own(vmap(pullback)(chunk)) for chunk in chunks])


def vjp(fn: Callable[..., Any], *primals: PyTree) -> tuple[Any, Callable[..., Any]]:
    """Return the value of `fn` and its pullback."""
    value, pullback = torch.func.vjp(fn, *primals)[:2]
    return value, pullback


def vjp_aux(fn: Callable[..., Any], primals: PyTree) -> tuple[Any, Callable[..., Any], Any]:
    """Return the value of `fn`, its pullback, and its auxiliary output."""
    packed, unpack = packing(fn)
    result: Any = torch.func.vjp(packed, primals, has_aux=True)
    value, pullback, tensors = result
    return value, pullback, unpack(tensors)


def grad_aux(fn: Callable[..., Any], primals: PyTree) -> tuple[PyTree, Any]:
    """Return the gradient of `fn`, and its auxiliary output."""
    packed, unpack = packing(fn)
    grads, tensors = torch.func.grad(packed, has_aux=True)(primals)
    return grads, unpack(tensors)


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
        value, aux = fn(primals)
        tensors, unpack = _tree.pack(aux)
        restore.append(unpack)
        return value, tensors

    return packed, lambda tensors: restore[0](tensors)


def basis(vector: Tensor) -> Tensor:
    """Return the `(m, m)` identity, one cotangent for each loss."""
    return torch.eye(vector.shape[0], dtype=vector.dtype, device=vector.device)


def as_they_are(grads: PyTree, heads: PyTree, weights: Tensor | None) -> PyTree:
    """Return the gradients as they are, where there are no heads."""
    return grads
