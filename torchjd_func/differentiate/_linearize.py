"""One forward pass of an objective, and the linear map that pulls weights back to parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func.differentiate._accumulate import Accumulated
from torchjd_func.differentiate._layered import observe
from torchjd_func.differentiate._layerwise import Batch, Layers, Layout, combine
from torchjd_func.differentiate._objectives import InstanceWise, MultiTask
from torchjd_func.differentiate._scaled import Scaled, multiplied, scale_by

PyTree = Any


class Linearized(NamedTuple):
    """An objective at one point."""

    vector: Tensor  # (m,): the losses, in leaf order
    losses: PyTree  # the losses in the user's structure
    aux: PyTree  # what the objective returned beside its losses
    pullback: Callable[[Tensor], list[Tensor]]  # (m,) -> leaves of J^T weights
    rebuild: Callable[[list[Tensor]], PyTree]  # leaves -> the pytree whose Jacobian is aggregated
    assemble: Callable[[PyTree, Tensor | None], PyTree]  # it, weights -> grads of the argument
    paths: list[str]  # the names of its leaves
    layers: Layers | None = None  # what layer-by-layer routes recorded


def linearize(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    method: str = "jacobian",
) -> Linearized:
    """Run the objective once and keep what is needed to pull cotangents back."""
    if isinstance(fn, MultiTask):
        return _linearize_multitask(fn, args, argnums, has_aux, method)
    if isinstance(fn, Scaled):
        return _linearize_scaled(fn, args, argnums, has_aux)
    if isinstance(fn, Accumulated):
        return _linearize_accumulated(fn, args, argnums, has_aux)
    primals, call = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    paths = _tree.paths(primals)
    _check.params(f"argument {argnums}", paths, flat)
    if method == "layerwise" or (method == "auto" and isinstance(fn, InstanceWise)):
        return _linearize_layers(fn, args, argnums, has_aux)

    def from_leaves(leaves: list[Tensor]) -> tuple[Tensor, tuple[PyTree, PyTree]]:
        """Return the losses as one vector, for torch.func to differentiate."""
        losses, aux = split_aux(call(rebuild(leaves)), has_aux)
        return as_vector(fn, losses), (losses, aux)

    vector, pull, (losses, aux) = vjp_aux(from_leaves, flat)
    return Linearized(vector, losses, aux, lambda c: pull(c)[0], rebuild, _identity, paths)


def _linearize_layers(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Run the objective once and keep what each use of parameters was applied to."""
    primals, _ = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    layout, examples, batch = _structure(fn, args, _check.argnums(argnums, len(args)))
    inputs = [x for x in _tree.leaves(args) if isinstance(x, Tensor)]
    inner = fn if batch is None else batch.fn
    unpackers: list[Callable[[list[Tensor]], Any]] = []

    def call(leaves: Sequence[Tensor], *example: Any) -> tuple[Tensor, list[Tensor]]:
        """Return losses as one vector (or the loss of one example), and tensors to unpack."""
        given = args if batch is None else batch.fill(args, example)
        losses, aux = split_aux(bind(inner, given, argnums)[1](rebuild(list(leaves))), has_aux)
        tensors, unpack = _tree.pack((losses, aux))
        unpackers.append(unpack)
        return as_vector(fn, losses) if batch is None else losses, tensors

    plans = fn.plans if isinstance(fn, InstanceWise) else {}
    vector, tensors, pull = observe(call, flat, layout, examples, inputs, batch, plans)
    losses, aux = unpackers[-1](tensors)
    layers = pull(*_cotangents(as_vector(fn, losses), layout))
    whole = (tuple(range(len(flat))),)

    def pullback(weights: Tensor) -> list[Tensor]:
        """Return the leaves of `J^T weights`."""
        return combine(layers, weights.unsqueeze(0), whole)

    paths = _tree.paths(primals)
    return Linearized(vector, losses, aux, pullback, rebuild, _identity, paths, layers)


def _structure(
    fn: Callable[..., Any], args: tuple[Any, ...], positions: tuple[int, ...]
) -> tuple[Layout, list[Tensor], Batch | None]:
    """Return how the objective treats examples, the tensors that have them, and how to map."""
    rest = [place for place in range(len(args)) if place not in positions]
    found = [x for i in rest for x in _tree.leaves(args[i]) if isinstance(x, Tensor) and x.ndim]
    example = fn.example if isinstance(fn, InstanceWise) else None
    if example is not None:
        dims = example.dims(len(args))
        sizes = [x.shape[dims[i]] for i in rest for x in _tree.leaves(args[i]) if _maps(dims[i], x)]
        if sizes and all(dims[position] is None for position in positions):
            batch = Batch(example.fn, tuple(rest), args, dims, example.randomness)
            return Layout("vmapped", sizes[0]), [], batch
    if isinstance(fn, InstanceWise) and found:
        return Layout("batched", found[0].shape[0]), found, None
    return Layout("shared", 0), [], None


def _maps(dim: Any, x: Any) -> bool:
    """Say whether `x` is mapped over one dimension."""
    return isinstance(dim, int) and isinstance(x, Tensor)


def _cotangents(vector: Tensor, layout: Layout) -> tuple[Any, Callable[[], Tensor], int]:
    """Return what to pull back: each loss by itself, unless examples are apart anyway."""
    whole = partial(basis, vector)
    shared = layout.kind == "shared"
    return (whole() if shared else torch.ones_like(vector)), whole, vector.shape[0]


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
    pullback: Callable[[Tensor], Any], cotangents: Tensor, chunk_size: int | None
) -> PyTree:
    """Pull `(k, m)` cotangents back, `chunk_size` at a time; 1 is a loop, without vmap."""
    if chunk_size == 1:
        return _tree.stack([pullback(row) for row in cotangents.unbind()])
    return vmap(pullback, chunk_size=chunk_size)(cotangents)


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


def _linearize_multitask(
    fn: MultiTask,
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    method: str,
) -> Linearized:
    """Use the chain rule through the features: each head is traversed once."""
    if argnums != 0 or len(args) != 2:
        rule = "be 0, of the two arguments (params, batch) of a multi-task objective"
        got, remedy = f"{argnums} of {len(args)}", "Close over what is not differentiated."
        _check.fail(ValueError, "`argnums`", rule, got, remedy)
    _check.choice("has_aux", has_aux, (fn.has_aux,))
    params, batch = args
    shared, head_params = _check.multitask_params(params, fn.heads)
    _check.disjoint(_tree.leaves(shared), _tree.paths(head_params), _tree.leaves(head_params))
    flat, rebuild = _tree.flatten(shared)
    paths = _tree.paths(shared)
    _check.params("the shared parameters", paths, flat)

    def trunk(leaves: list[Tensor]) -> tuple[PyTree, PyTree]:
        """Return features and auxiliary output."""
        out = fn.trunk(rebuild(leaves), batch)
        features, aux = _check.aux_pair(out) if has_aux else (out, ())
        _check.features(_tree.paths(features), _tree.leaves(features))
        return features, aux

    features, aux, pull_trunk, pull_layers = _run_trunk(trunk, flat, batch, method)
    losses, head_grads, rows = {}, {}, []
    for name in sorted(fn.heads):
        losses[name], head_grads[name], row = _head(fn, name, head_params[name], features, batch)
        rows.append(row)
    cotangents = _tree.stack(rows)
    return Linearized(
        _tree.ravel(losses),
        losses,
        aux,
        lambda weights: pull_trunk(_tree.weighted_sum(cotangents, weights)),
        rebuild,
        lambda grads, weights: (grads, _scaled(fn, head_grads, weights)),
        paths,
        pull_layers(cotangents, None, len(rows)) if pull_layers else None,
    )


def _run_trunk(
    trunk: Callable[[list[Tensor]], tuple[PyTree, PyTree]],
    flat: list[Tensor],
    batch: PyTree,
    method: str,
) -> tuple[PyTree, PyTree, Callable[[PyTree], list[Tensor]], Callable[..., Layers] | None]:
    """Return features, auxiliary output, the trunk's pullback, and that of its layers if wanted."""
    if method != "layerwise":
        features, pull, aux = vjp_aux(trunk, flat)
        return features, aux, lambda cotangent: pull(cotangent)[0], None
    packed, unpack = packing(trunk)
    layout, inputs = Layout("shared", 0), [x for x in _tree.leaves(batch) if isinstance(x, Tensor)]
    features, tensors, pull_layers = observe(packed, flat, layout, [], inputs, None, {})

    def pull_back(cotangent: PyTree) -> list[Tensor]:
        """Pull one cotangent of the features back."""
        layers = pull_layers(_tree.stack([cotangent]), None, 1)
        ones = layers.values[0].new_ones(1, 1)
        return combine(layers, ones, (tuple(range(len(flat))),))

    return features, unpack(tensors), pull_back, pull_layers


def _scaled(fn: MultiTask, head_grads: dict[str, PyTree], weights: Tensor | None) -> PyTree:
    """Return the gradients of the heads, times the weights of their tasks if so declared."""
    if not fn.scale_heads:
        return head_grads
    pairs = zip(sorted(fn.heads), _check.head_weights(weights).unbind(), strict=True)
    return {
        name: _tree.map(lambda leaf, weight=weight: weight.to(leaf.dtype) * leaf, head_grads[name])
        for name, weight in pairs
    }


def _head(
    fn: MultiTask, name: str, params: PyTree, features: PyTree, batch: Any
) -> tuple[Tensor, PyTree, PyTree]:
    """Return the loss of one task, its gradient by the head, and by the features."""
    loss, pull = vjp(lambda p, z: fn.heads[name](p, z, batch), params, features)
    if loss.ndim != 0:
        remedy = "Reduce the loss of the task over the batch."
        _check.fail(ValueError, f"`heads[{name!r}]`", "return a scalar", tuple(loss.shape), remedy)
    _check.losses([name], [loss])
    head_grad, feature_grad = pull(torch.ones_like(loss))
    return loss, head_grad, feature_grad


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
        lambda grads, weights: _tree.mean([part.assemble(grads, weights) for part in parts]),
        parts[0].paths,
    )


def _linearize_scaled(
    fn: Scaled, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool
) -> Linearized:
    """Differentiate larger losses, and undo the scale of all that comes out."""
    large = linearize(multiplied(fn.fn, fn.scale, has_aux), args, argnums, has_aux)
    up, down = partial(scale_by, fn.scale), partial(scale_by, 1 / fn.scale)
    return Linearized(
        down(large.vector),
        down(large.losses),
        large.aux,
        lambda cotangent: down(large.pullback(cotangent)),
        large.rebuild,
        lambda grads, weights: down(large.assemble(up(grads), weights)),
        large.paths,
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
    raise NotImplementedError


def _identity(grads: PyTree, weights: Tensor | None) -> PyTree:
    """Return the gradients as they are."""
    return grads
