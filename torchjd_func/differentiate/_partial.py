"""Partial Jacobian descent: weights from some parameters, applied to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._types import Aggregator
from torchjd_func.differentiate._accumulate import Accumulated
from torchjd_func.differentiate._linearize import is_layered, linearize
from torchjd_func.differentiate._objectives import MultiTask
from torchjd_func.differentiate._pullback import bind, vjp_aux
from torchjd_func.differentiate._routes import contract, contract_whole, pullback_of, whole
from torchjd_func.differentiate._scaled import Scaled
from torchjd_func.differentiate._shards import Sharded

PyTree = Any


def partial_grads(
    fn: Callable[..., Any],
    rule: Aggregator,
    where: Callable[[str], bool],
    state: Any,
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
    route: str,
    chunk_size: int | None,
) -> tuple[PyTree, Any, Any]:
    """Weigh by the Gramian of the parameters that `where` names; pull the weights back to all."""
    weighting = _check.weighting_present("where", rule.name, rule.weighting)
    remedy = "Write the objective as one function of all parameters."
    _check.plain("where", fn, (MultiTask, Accumulated, Scaled, Sharded), remedy)
    primals, call = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    paths = _tree.paths(primals)
    _check.params(f"argument {argnums}", paths, flat)
    chosen = [place for place, path in enumerate(paths) if where(path)]
    _check.some_named("where", chosen, paths)

    if is_layered(fn, route):
        linear = linearize(fn, args, argnums, has_aux, route)
        matrices, _ = contract(linear, route, chunk_size, (tuple(chosen),))
        weights, state = weighting(matrices[0], state, losses=linear.vector)
        grads = pullback_of(linear, whole(linear))(weights.unsqueeze(0))
        return grads, (linear.losses, linear.aux) if has_aux else linear.losses, state

    def losses_and_gramian(leaves: list[Tensor]) -> tuple[Tensor, Any]:
        """Return the losses, for all parameters to be differentiated, and the partial Gramian."""

        def objective(some: list[Tensor]) -> Any:
            """Return the losses of the chosen parameters alone."""
            filled = list(leaves)
            for place, leaf in zip(chosen, some, strict=True):
                filled[place] = leaf
            return call(rebuild(filled))

        linear = linearize(objective, ([leaves[place] for place in chosen],), 0, has_aux)
        gramian, _ = contract_whole(linear, route, chunk_size)
        return linear.vector, (linear.losses, linear.aux, gramian)

    vector, pull, (losses, aux, gramian) = vjp_aux(losses_and_gramian, flat)
    weights, state = weighting(gramian, state, losses=vector)
    grads = rebuild(pull(weights.to(vector.dtype))[0])
    return grads, (losses, aux) if has_aux else losses, state
