"""From an objective and a rule to one update direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchjd_func import _check, _tree
from torchjd_func._types import Aggregator, Scalarizer, Weighting
from torchjd_func.differentiate._jacobian import rows, value
from torchjd_func.differentiate._linearize import linearize
from torchjd_func.differentiate._objectives import InstanceWise, MultiTask, is_gathered
from torchjd_func.differentiate._partial import partial_grads
from torchjd_func.differentiate._pullback import Linearized, as_vector, bind, grad_aux, split_aux
from torchjd_func.differentiate._routes import (
    contract,
    contract_whole,
    pullback_of,
    validate,
    whole,
)
from torchjd_func.differentiate._scaled import Scaled
from torchjd_func.differentiate._shards import Sharded

PyTree = Any


def grad(
    fn: Callable[..., Any],
    rule: Aggregator | Scalarizer,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Callable[[str], bool] | None = None,
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
            cheaper, the nearer they are to the losses.

    Returns:
        `f(state, *args) -> (grads, state)`, grads like the differentiated argument; `state` may be
        `None` at the first call. `(grads, aux, state)` with aux.

    Raises:
        TypeError: If `rule` is neither an Aggregator nor a Scalarizer.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = lambda x: torch.stack([x[0] + x[1], x[0] - 2 * x[1]])
        >>> grads, state = jd.grad(objective, jd.upgrad())(None, torch.zeros(2))
        >>> grads
        tensor([ 1.3500, -0.4500])
    """
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size, "where": where}
    run = grad_and_value(fn, rule, argnums, **options)

    def grad_fn(state: Any, *args: Any) -> tuple[Any, ...]:
        """Return the update direction (and aux) and the next state."""
        grads, out, state = run(state, *args)
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
    where: Callable[[str], bool] | None = None,
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
        `f(state, *args) -> (grads, losses, state)`; `(grads, (losses, aux), state)` with aux.

    Raises:
        TypeError: If `rule` is neither an Aggregator nor a Scalarizer.

    Example:
        >>> import torch, torchjd_func as jd
        >>> step = jd.grad_and_value(lambda x: x.square(), jd.mean())
        >>> step(None, torch.tensor([1.0, 3.0]))
        (tensor([1., 3.]), tensor([1., 9.]), ())
    """
    _check.rule(rule, (Aggregator, Scalarizer))
    if where is not None:
        _check.combinable("where", rule, (Aggregator,))
        _check.weighting_present("where", rule.name, getattr(rule, "weighting", None))
    validate(route, chunk_size)

    def grad_and_value_fn(state: Any, *args: Any) -> tuple[Any, Any, Any]:
        """Return the update direction, the losses (and aux) and the next state."""
        if isinstance(rule, Scalarizer):
            _check.plain(
                "a scalarizer", fn, (Scaled, Sharded), "Use an Aggregator, e.g. jd.mean()."
            )
            _check.not_gathered("a scalarizer", is_gathered(fn))
            return _scalarized(fn, rule, state, args, argnums, has_aux)
        if where is not None:
            return partial_grads(fn, rule, where, state, args, argnums, has_aux, route, chunk_size)
        linear = linearize(fn, args, argnums, has_aux, route)
        grads, weights, state = _aggregated(linear, rule, state, route, chunk_size)
        heads = linear.heads if rule.average is None else rule.average(linear.heads)
        return linear.assemble(grads, heads, weights), value(linear, has_aux), state

    return grad_and_value_fn


def init_state(
    rule: Aggregator | Scalarizer | Weighting,
    fn: Callable[..., Any],
    *args: Any,
    key: Tensor | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
) -> Any:
    """Return the initial state of `rule` for the objective `fn`, from shapes alone.

    Args:
        rule: As for `jd.grad`; or a Weighting, as for `jd.double_sampling`.
        fn: The objective; nothing is computed, only its shapes are derived.
        *args: Arguments of `fn`, such as the first batch.
        key: `(2,)`, from `jd.random.key`; random methods need it.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.

    Returns:
        The state, for `jd.grad(fn, rule)` or `jd.double_sampling(fn, rule)`.

    Raises:
        ValueError: If a random method is given no key.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.init_state(jd.upgrad(), lambda x: x.square(), torch.ones(3))
        ()
    """
    _check.rule(rule, (Aggregator, Scalarizer, Weighting))
    primals, _ = bind(fn, args, argnums)
    losses = _losses_like(fn, args, has_aux)
    if isinstance(rule, Scalarizer):
        return rule.init(losses, key=key)
    m = sum(leaf.numel() for leaf in _tree.leaves(losses))
    if isinstance(fn, InstanceWise) and fn.ranks is not None:
        m = fn.ranks.size() * m
    if isinstance(rule, Weighting):
        return rule.init(_tree.placeholder(_tree.leaves(losses)[0], (m, m)), key=key)
    shared = primals[0] if isinstance(fn, MultiTask) else primals
    shared = _tree.map(fn.like, shared) if isinstance(fn, Sharded) else shared
    _check.params(f"argument {argnums}", _tree.paths(shared), _tree.leaves(shared))
    jac = _tree.map(lambda leaf: _tree.placeholder(leaf, (m, *leaf.shape)), shared)
    return rule.init(jac, key=key)


def _aggregated(
    linear: Linearized, rule: Aggregator, state: Any, route: str, chunk_size: int | None
) -> tuple[PyTree, Tensor | None, Any]:
    """Return the update direction, its weights if there are such, and the next state."""
    if rule.partition is not None:
        groups, weigh = rule.partition(linear.paths)
        matrices, pullback = contract(linear, route, chunk_size, groups)
        weights, state = weigh(matrices, state, linear.vector)
        return pullback(weights), None, state
    if rule.weighting is not None:
        matrix, pullback = _statistic(linear, rule.weighting.needs, route, chunk_size)
        weights, state = rule.weighting(matrix, state, losses=linear.vector)
        return pullback(weights), weights, state
    by_rows = rule if linear.shards is None else linear.shards.by_rows(rule)
    grads, state = by_rows(rows(linear, chunk_size), state, losses=linear.vector)
    return grads, None, state


def _statistic(
    linear: Linearized, needs: str, route: str, chunk_size: int | None
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Return what a weighting needs to see, and the pullback that goes with it."""
    if needs == "size":
        m = linear.vector.shape[0]
        pullback = pullback_of(linear, whole(linear))
        return _tree.placeholder(linear.vector, (m, m)), lambda w: pullback(w.unsqueeze(0))
    return contract_whole(linear, route, chunk_size)


def _scalarized(
    fn: Callable[..., Any],
    rule: Scalarizer,
    state: Any,
    args: tuple[Any, ...],
    argnums: int | tuple[int, ...],
    has_aux: bool,
) -> tuple[Any, Any, Any]:
    """Differentiate the one loss that `rule` makes of all: one backward pass."""
    primals, call = bind(fn, args, argnums)
    flat, rebuild = _tree.flatten(primals)
    _check.params(f"argument {argnums}", _tree.paths(primals), flat)

    def loss_fn(leaves: list[Tensor]) -> tuple[Tensor, Any]:
        """Return the loss, and all else as auxiliary output."""
        losses, aux = split_aux(call(rebuild(leaves)), has_aux)
        loss, new_state = rule(as_vector(fn, losses), state)
        return loss, (losses, aux, new_state)

    found, (losses, aux, state) = grad_aux(loss_fn, flat)
    grads = rebuild(found) if rule.average is None else rule.average(rebuild(found))
    return grads, (losses, aux) if has_aux else losses, state


def _losses_like(fn: Callable[..., Any], args: tuple[Any, ...], has_aux: bool) -> PyTree:
    """Return placeholders for the losses of `fn`; its arithmetic runs on shapes only."""
    if torch.compiler.is_compiling():  # traced on shapes anyway, and then dead code
        args = _tree.map(_fake_like, args) if isinstance(fn, Sharded) else args
        return split_aux(fn(*args), has_aux)[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses, _ = split_aux(fn(*_tree.map(_fake_like, args)), has_aux)
    return _tree.map(
        lambda leaf: torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape),
        losses,
    )


def _fake_like(leaf: Any) -> Any:
    """Return a tensor of the same shape, under a mode that allocates nothing."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
