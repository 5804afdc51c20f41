"""From an objective and a rule to one update direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _names, _tree
from torchjd_func._precision import full_precision
from torchjd_func._types import Aggregator, Scalarizer
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._jacobian import rows
from torchjd_func.differentiate._linearized import Linearized, assemble, value
from torchjd_func.differentiate._objective import as_objective
from torchjd_func.differentiate._outside import (
    check_inside,
    check_options,
    check_state,
    kept_buffers,
)
from torchjd_func.differentiate._pullback import vjp_aux
from torchjd_func.differentiate._request import Request, Where
from torchjd_func.differentiate._routes import (
    contract,
    contract_whole,
    pullback_of_all,
    validate,
    whole,
)
from torchjd_func.differentiate._row_norms import squared_norms
from torchjd_func.differentiate._verb import linearize

PyTree = Any


def grad(
    fn: Callable[..., Any],
    rule: Aggregator | Scalarizer,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective and a rule into the function that returns one update direction.

    Args:
        fn: As for `jd.jac`.
        rule: An Aggregator, such as `jd.upgrad()`, or a Scalarizer.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`; how an Aggregator with a weighting gets its Gramian, and one of
            `jd.grouped` those of its groups.
        chunk_size: As for `jd.gramian`.
        where: Predicate of a parameter's path, such as `"encoder.0.weight"`: the Gramian is of
            these parameters only, its weights are applied to all (partial Jacobian descent). The
            cheaper, the nearer they are to the losses. `jd.features`, for `jd.multitask`: weights
            come from the gradients by the features.

    Returns:
        `f(state, *args, present=None, size=None, **kwargs) -> (grads, state)`, grads like the
        differentiated argument; `state` may be `None` at the first call. `(grads, aux, state)` with
        aux. Keyword arguments are as for `jd.jac`. With `present=` the direction is that of the
        losses that there are; with none of them it is zero, and the state stays.

    Raises:
        TypeError: If `rule` is neither an Aggregator nor a Scalarizer, or `fn` is a module.
        ValueError: If an option is not allowed, or no loss depends on the argument.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = lambda x: torch.stack([x[0] + x[1], x[0] - 2 * x[1]])
        >>> grads, state = jd.grad(objective, jd.upgrad())(None, torch.zeros(2))
        >>> grads
        tensor([ 1.3500, -0.4500])
    """
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size, "where": where}
    run = grad_and_value(fn, rule, argnums, **options)

    def grad_fn(state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the update direction (and aux) and the next state."""
        grads, out, state = run(state, *args, **kwargs)
        return (grads, out[1], state) if has_aux else (grads, state)

    return grad_fn


def grad_and_value(
    fn: Callable[..., Any],
    rule: Aggregator | Scalarizer,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective and a rule into the function that also returns the losses.

    Args:
        fn: As for `jd.jac`.
        rule: As for `jd.grad`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.
        where: As for `jd.grad`.

    Returns:
        `f(state, *args, present=None, size=None, **kwargs) -> (grads, losses, state)`;
        `(grads, (losses, aux), state)` with aux.

    Raises:
        TypeError: If `rule` is neither an Aggregator nor a Scalarizer, or `fn` is a module.

    Example:
        >>> import torch, torchjd_func as jd
        >>> step = jd.grad_and_value(lambda x: x.square(), jd.mean())
        >>> step(None, torch.tensor([1.0, 3.0]))
        (tensor([1., 3.]), tensor([1., 9.]), ())
    """
    _check.rule(rule, (Aggregator, Scalarizer))
    _check.objective(fn)
    if where is not None:
        _check.combinable("where", rule, (Aggregator,))
        _check.weighting_present("where", rule.name, getattr(rule, "weighting", None))
    validate(route, chunk_size)

    scalar, by_name = isinstance(rule, Scalarizer), _names.named_options(rule)
    options = Request(
        argnums,
        has_aux,
        "jacobian" if scalar else route,
        chunk_size,
        where,
        rows=not scalar,
        spans=rule.processes is not None,
    )
    if options.spans or as_objective(fn).spans_processes:
        options = options._replace(rule=repr(rule))

    def grad_and_value_fn(state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Return the update direction, the losses (and aux) and the next state."""
        given, state = state, detached(state)
        check_state(given, state)
        with kept_buffers(has_aux):
            linear = linearize(fn, args, kwargs, options, state)
        check_inside(linear.losses)
        check_names(by_name, linear.losses)
        here: Any = rule if rule.processes is None else rule.processes.of_part(linear.part)
        with full_precision():
            if scalar:
                grads, weights, state = _scalarized(linear, here, state)
                grads = assemble(linear, grads, weights)
                grads = grads if rule.processes is None else rule.processes.average(grads)
            else:
                grads, weights, state = _aggregated(linear, here, state, route, chunk_size)
                grads = assemble(linear, grads, weights, here.processes)
        result = grads, value(linear, has_aux), state
        values = detached(result)
        check_options(result, values, linear.losses)
        return values

    return grad_and_value_fn


def check_names(by_name: list[tuple[str, tuple[str, ...]]], losses: PyTree) -> None:
    """Check that options by name name the losses."""
    for option, names in by_name:
        _check.loss_names(option, names, _tree.paths(losses))


def _aggregated(
    linear: Linearized, rule: Aggregator, state: Any, route: str, chunk_size: int | None
) -> tuple[PyTree, Tensor | None, Any]:
    """Return the update direction, its weights if there are such, and the next state."""
    present = {} if linear.present is None else {"present": linear.present}
    if rule.partition is not None:
        groups, weigh = rule.partition(linear.leaves.paths)
        matrices, pullback = contract(linear, route, chunk_size, groups)
        weights, state = weigh(matrices, state, linear.vector, **present)
        return pullback(weights), None, state
    if rule.weighting is not None:
        matrix, pullback = _statistic(linear, rule.weighting.needs, route, chunk_size)
        weights, state = rule.weighting(matrix, state, losses=linear.vector, **present)
        return pullback(weights), weights, state
    by_rows = rule if linear.shards is None else linear.shards.by_rows(rule)
    grads, state = by_rows(rows(linear), state, losses=linear.vector, **present)
    return grads, None, state


def _statistic(
    linear: Linearized, needs: str, route: str, chunk_size: int | None
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Return what a weighting needs to see, and the pullback that goes with it."""
    if needs == "size" and linear.seen is None:
        m = linear.vector.shape[0]
        return _tree.placeholder(linear.vector, (m, m)), pullback_of_all(linear)
    if needs == "norms" and linear.jacobian.layers is not None and route != "jacobian":
        places = whole(linear)[0] if linear.seen is None else linear.seen.places
        squares = squared_norms(linear, route, chunk_size, places)
        return torch.diag(squares), pullback_of_all(linear)
    return contract_whole(linear, route, chunk_size)


def _scalarized(linear: Linearized, rule: Scalarizer, state: Any) -> tuple[PyTree, Tensor, Any]:
    """Weigh by the derivative of the one loss that `rule` makes of all: one backward pass."""

    def loss_fn(vector: Tensor) -> tuple[Tensor, Any]:
        loss, after = rule(vector, state, present=linear.present)
        _check.dependent_loss(rule.name, loss.requires_grad)
        return loss, after

    loss, pull, state = vjp_aux(loss_fn, linear.vector)
    weights = pull(loss.new_ones(()))
    return pullback_of_all(linear)(weights), weights, state
