"""Objectives of tasks that share features, by the chain rule through the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._autocast import as_called
from torchjd_func.differentiate._heads import Pulled, pull_heads
from torchjd_func.differentiate._layerwise import (
    Layers,
    Layout,
    Problem,
    Returned,
    combine,
    layers,
    run,
)
from torchjd_func.differentiate._linearized import Heads, Jacobian, Leaves, Linearized, Seen
from torchjd_func.differentiate._objective import Function, by_pullback, rows_like
from torchjd_func.differentiate._pullback import (
    call,
    packing,
    unscaled,
    vjp_aux,
    vjp_nested,
)
from torchjd_func.differentiate._request import Request, bind, chosen
from torchjd_func.differentiate._where import features

PyTree = Any


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class MultiTask:
    """An objective `((shared, {name: head_params}), batch) -> {name: loss}` of shared features."""

    trunk: Callable[..., Any]
    heads: Mapping[str, Callable[..., Any]]
    has_aux: bool = False
    scale_heads: bool = False

    def __call__(
        self, params: tuple[Any, Mapping[str, Any]], batch: Any = None, **kwargs: Any
    ) -> Any:
        """Return the dict of losses (and `aux`, if the trunk has one)."""
        shared, head_params = _check.multitask_params(params, self.heads)
        z, aux = self.features(shared, batch, kwargs)
        losses = {
            name: head(head_params[name], z, batch, **kwargs) for name, head in self.heads.items()
        }
        return (losses, aux) if self.has_aux else losses

    def features(self, shared: PyTree, batch: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the features, and the auxiliary output, which is `()` if there is none."""
        out = call(self.trunk, (shared, batch), kwargs)
        z, aux = _check.aux_pair(out) if self.has_aux else (out, ())
        _check.features(_tree.paths(z), _tree.leaves(z))
        return z, aux

    def linearize(self, request: Request) -> Linearized:
        """Use the chain rule through the features: each head is traversed once."""
        return _linearize(self, request)

    def wrap(self, change: Callable[[Function], Function]) -> MultiTask:
        """Return the objective of the changed trunk and heads."""
        heads = {name: change(head) for name, head in self.heads.items()}
        return MultiTask(change(self.trunk), heads, self.has_aux, self.scale_heads)

    def rows_like(self, primals: PyTree, m: int) -> PyTree:
        """Return placeholders for the rows of the shared parameters."""
        return rows_like(_check.trained_params(primals, self.heads)[0], m)

    def plan(self, request: Request) -> None:
        """Remember nothing."""

    @property
    def spans_processes(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"MultiTask({', '.join(self.heads)})"


def _linearize(fn: MultiTask, request: Request) -> Linearized:
    """Run the trunk, and pull back through each head by itself."""
    shared, head_params, batch, kwargs = _arguments(fn, request)
    bound = bind(request._replace(args=(shared,)))
    where = None if request.alone else request.where
    by_leaves = None if where is features else where
    places = () if by_leaves is None else chosen(by_leaves, bound.paths)
    partly = by_leaves is not None and request.route in ("auto", "jacobian")

    def trunk(leaves: list[Tensor]) -> tuple[PyTree, PyTree]:
        with as_called(request.autocast):
            z, aux = fn.features(bound.fill(leaves)[0], batch, kwargs)
        if request.route != "layerwise":  # which runs it for its shapes, too
            _check.dependent(any(leaf.requires_grad for leaf in _tree.leaves(z)))
        return z, aux

    def heads(z: PyTree) -> Pulled:
        return pull_heads(fn.heads, head_params, z, batch, kwargs, request)

    def jacobian(pulled: Pulled, pull: Callable[[PyTree], list[Tensor]]) -> Jacobian:
        def through(weights: Tensor) -> list[Tensor]:
            """Pull a combination of the losses' gradients by the features back."""
            return unscaled(pull(_tree.weighted_sum(pulled.cotangents, weights)), request.scale)

        return by_pullback(through, pulled.vector, request.chunk_size)

    def look(z: PyTree, pull: Callable[[PyTree], list[Tensor]]) -> tuple[Pulled, list[Tensor]]:
        pulled = heads(z)
        return pulled, jacobian(pulled, pull).rows()

    if partly:
        _, pull, aux, (pulled, rows) = vjp_nested(trunk, bound.leaves, places, look)
        seen, layers = Seen(places, rows), None
    else:
        z, pull, aux, pull_layers = _run_trunk(trunk, bound.leaves, batch, request.route)
        pulled = heads(z)
        layers = pull_layers(pulled.cotangents, len(pulled.vector)) if pull_layers else None
        by_features = Seen(rows=unscaled(_tree.leaves(pulled.cotangents), request.scale))
        seen = by_features if where is features else Seen(places) if places else None
    return Linearized(
        losses=pulled.losses,
        aux=aux,
        vector=pulled.vector,
        present=pulled.present,
        leaves=Leaves(bound.paths, bound.rebuild),
        jacobian=jacobian(pulled, pull)._replace(layers=layers, scale=request.scale),
        seen=seen,
        heads=Heads(pulled.rows, pulled.counts, fn.scale_heads or not request.rows),
    )


def _arguments(fn: MultiTask, request: Request) -> tuple[PyTree, Mapping[str, PyTree], Any, Any]:
    """Return shared parameters, those of heads, the batch, and what else goes by name."""
    kwargs = dict(request.kwargs)
    batch = [*request.args[1:], *([kwargs.pop("batch")] if "batch" in kwargs else [])]
    if request.argnums != 0 or len(batch) != 1:
        rule = "be 0, of the two arguments (params, batch) of a multi-task objective"
        got = f"{request.argnums} of {1 + len(batch)}"
        remedy = (
            "Pass the batch as one tuple or dict, after the params; a step takes the state before."
        )
        _check.fail(ValueError, "`argnums`", rule, got, remedy)
    _check.same_aux("jd.multitask", request.has_aux, fn.has_aux)
    shared, head_params = _check.trained_params(request.args[0], fn.heads)
    _check.disjoint(_tree.leaves(shared), _tree.paths(head_params), _tree.leaves(head_params))
    return shared, head_params, batch[0], kwargs


def _run_trunk(
    trunk: Callable[[list[Tensor]], tuple[PyTree, PyTree]],
    flat: list[Tensor],
    batch: PyTree,
    route: str,
) -> tuple[PyTree, Callable[[PyTree], list[Tensor]], PyTree, Callable[..., Layers] | None]:
    """Return features, the trunk's pullback, auxiliary output, and its layers if wanted."""
    if route != "layerwise":
        return (*vjp_aux(trunk, flat), None)
    packed, unpack = packing(trunk)
    inputs = _tree.tensors(batch)

    def run_packed(leaves: list[Tensor]) -> Callable[[], Returned]:
        value, aux = packed(leaves)
        return lambda: Returned(_tree.leaves(value), value, aux)

    recorded = run(Problem(run_packed, flat, Layout("shared", 0), inputs), {})
    _check.dependent(recorded.dependent)

    def pull_back(cotangent: PyTree) -> list[Tensor]:
        found = _layers(recorded, _tree.stack([cotangent]), 1)
        return combine(found, flat[0].real.new_ones(1, 1), (tuple(range(len(flat))),))

    return recorded.outputs, pull_back, unpack(recorded.aux), partial(_layers, recorded)


def _layers(recorded: Any, cotangents: PyTree, m: int) -> Layers:
    """Pull `m` cotangents of the features back, layer by layer."""
    return layers(recorded, cotangents, None, m)


def multitask(
    trunk: Callable[..., Any],
    heads: Mapping[str, Callable[..., Any]],
    *,
    has_aux: bool = False,
    scale_heads: bool = False,
) -> MultiTask:
    """Declare that tasks share features, and nothing else.

    The Jacobian and the Gramian of such an objective are those of the shared parameters, by the
    chain rule through the features, each head traversed once for each of its losses. The gradient
    of a head is the plain gradient of its own losses, added up. A scalarizer sees an ordinary
    objective: it weighs heads too. Whatever a trunk or a head closes over instead of taking as
    parameters is frozen.

    With `present={name: bool}` of Python bools, an absent head is not run: its loss is NaN, and its
    gradients are `None`, so that optimizers skip it. With tensors it runs, and they are zeros.

    Args:
        trunk: `trunk(shared, batch) -> features`, a floating tensor or a pytree of such; a task
            need not use all of them.
        heads: `{name: head}` with `head(head_params, features, batch) -> ()`; or a tensor, or a
            pytree, of several losses. Keyword arguments of a transformed function go to the trunk
            and to all heads.
        has_aux: Whether the trunk returns `(features, aux)`; the objective then returns
            `(losses, aux)`, and transforms are called with `has_aux=True` as well.
        scale_heads: Whether the gradient of head i is multiplied by weight i too, as if the sum of
            the weighted losses was differentiated. Only for methods with a weighting.

    Returns:
        The objective, called as `objective((shared, {name: head_params}), batch)`; losses come back
        as a dict, and are counted in the order of the sorted names.

    Raises:
        TypeError: If `heads` is not a dict.
        ValueError: If there is no head; from transforms, if a tensor is both shared and in a head.

    Example:
        >>> import torch, torchjd_func as jd
        >>> heads = {"a": lambda p, z, batch: (p * z).sum(), "b": lambda p, z, batch: z.sum()}
        >>> objective = jd.multitask(lambda w, batch: batch @ w, heads)
        >>> params = (torch.ones(2), {"a": torch.tensor(3.0), "b": {}})
        >>> jd.jac(objective)(params, torch.eye(2))
        tensor([[3., 3.],
                [1., 1.]])
    """
    _check.heads(heads)
    for fn in (trunk, *heads.values()):
        _check.objective(fn)
    return MultiTask(trunk, dict(heads), has_aux, scale_heads)
