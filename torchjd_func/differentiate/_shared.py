"""Linearize a multi-task objective by the chain rule through its features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._layerwise import Layers, Problem, combine, layers, run
from torchjd_func.differentiate._objectives import MultiTask
from torchjd_func.differentiate._pullback import Linearized, packing, vjp, vjp_aux

PyTree = Any


def linearize_multitask(
    fn: MultiTask,
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    route: str,
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

    features, aux, pull_trunk, pull_layers = _run_trunk(trunk, flat, batch, route)
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
        lambda grads, heads, weights: (grads, _scaled(fn, heads, weights)),
        paths,
        pull_layers(cotangents, None, len(rows)) if pull_layers else None,
        head_grads,
    )


def _run_trunk(
    trunk: Callable[[list[Tensor]], tuple[PyTree, PyTree]],
    flat: list[Tensor],
    batch: PyTree,
    route: str,
) -> tuple[PyTree, PyTree, Callable[[PyTree], list[Tensor]], Callable[..., Layers] | None]:
    """Return features, auxiliary output, the trunk's pullback, and that of its layers if wanted."""
    if route != "layerwise":
        features, pull, aux = vjp_aux(trunk, flat)
        return features, aux, lambda cotangent: pull(cotangent)[0], None
    packed, unpack = packing(trunk)
    inputs = _tree.tensors(batch)
    recorded = run(Problem(packed, flat, "shared", 0, inputs), {})

    def pull_back(cotangent: PyTree) -> list[Tensor]:
        """Pull one cotangent of the features back."""
        found = layers(recorded, _tree.stack([cotangent]), None, 1)
        return combine(found, flat[0].new_ones(1, 1), (tuple(range(len(flat))),))

    return recorded.outputs, unpack(recorded.aux), pull_back, partial(layers, recorded)


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
