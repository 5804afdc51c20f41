"""The initial state of a rule, from the shapes of the losses of an objective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchjd_func import _check, _names, _tree
from torchjd_func._shares import same
from torchjd_func._types import Aggregator, Scalarizer, Weighting
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._grad import check_names
from torchjd_func.differentiate._linearized import split_aux
from torchjd_func.differentiate._numbered import numbered
from torchjd_func.differentiate._objective import as_objective
from torchjd_func.differentiate._outside import check_passed, outside
from torchjd_func.differentiate._pullback import call
from torchjd_func.differentiate._request import Request, bind
from torchjd_func.differentiate._routes import validate
from torchjd_func.differentiate._untouched import untouched

PyTree = Any


class Brief(NamedTuple):
    """What losses are like, but for their numbers."""

    rebuild: Callable[[list[Any]], PyTree]
    paths: list[str]
    like: list[tuple[torch.Size, torch.dtype, torch.device]]
    tracked: list[bool] | None  # whether each depends on what is differentiated, if known
    outside: list[torch.Size]  # of what they depend on besides, in plain autograd


def init_state(
    rule: Aggregator | Scalarizer | Weighting,
    fn: Callable[..., Any],
    *args: Any,
    key: Tensor | None = None,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    route: str = "auto",
) -> Any:
    """Return the initial state of `rule` for the objective `fn`.

    The objective runs on shapes alone, and for real where it reads values. Modules that it reaches,
    their caches and buffers, and random generators are left as they were.

    Args:
        rule: As for `jd.grad`; or a Weighting, as for `jd.double_sampling`.
        fn: The objective.
        *args: Arguments of `fn`, such as the first batch; bind keyword arguments with
            `functools.partial`.
        key: `(2,)`, from `jd.random.key`; random methods need it.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: As for `jd.grad`; it changes no state.

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
    validate(route, None)
    _check.flag("has_aux", has_aux)
    objective, given, args = as_objective(fn), args, detached(args)
    check_passed(given, {}, (args, {}), argnums)
    positions = _check.argnums(argnums, len(args))
    primals = tuple(args[i] for i in positions)
    primals = primals if isinstance(argnums, tuple) else primals[0]
    _check_params(objective, primals)
    request = Request(argnums, has_aux, route, args=args)
    losses = _losses_like(objective, request)
    check_names(_names.named_options(rule), losses)
    count = sum(leaf.numel() for leaf in _tree.leaves(losses))
    if count:
        objective.plan(request)
    jac = objective.rows_like(primals, count)
    m = _tree.leading_size(jac)
    if not isinstance(rule, Weighting) and rule.processes is not None:
        rule.processes.agree({"rule": rule.name, **same("parameters", primals)})
    if isinstance(rule, Scalarizer):
        here = count == m  # or other processes have losses as well
        return rule.init(losses if here else _tree.placeholder(losses, (m,)), key=key)
    if isinstance(rule, Weighting):
        return rule.init(_tree.placeholder(_tree.leaves(losses)[0], (m, m)), key=key)
    return rule.init(jac, key=key)


def _check_params(objective: Any, primals: PyTree) -> None:
    """Check the parameters, before anything runs."""
    if objective.spans_processes:  # placeholders of their rows are a question to all processes
        paths, leaves = _tree.paths(primals), _tree.leaves(primals)
        _check.params("the differentiated argument", paths, leaves)
    else:
        objective.rows_like(primals, 1)


def _losses_like(fn: Any, request: Request) -> PyTree:
    """Return placeholders for the losses of an objective; say which of them nothing trains."""
    if torch.compiler.is_compiling():  # traced on shapes anyway, and then dead code
        args = _tree.map(_empty_like, request.args) if fn.spans_processes else request.args
        return split_aux(fn(*args), request.has_aux)[0]
    brief = _evaluated(fn, request)
    if brief.tracked and not fn.spans_processes:
        _check.dependent(any(brief.tracked))
        _check.each_dependent(brief.paths, brief.tracked)
        _check.inside(brief.outside)
    return brief.rebuild(
        [torch.zeros((), dtype=x, device=device).expand(shape) for shape, x, device in brief.like]
    )


def _evaluated(fn: Any, request: Request) -> Brief:
    """Run on shapes; for real, if that fails, as it does where values are read."""

    def brief(out: Any) -> tuple[Brief, list[Tensor]]:
        """Return what is known of the losses, and these."""
        losses, _ = split_aux(out, request.has_aux, some=not fn.spans_processes)
        flat, rebuild = _tree.flatten(losses)
        like = [(x.shape, x.dtype, x.device) for x in flat]
        tracked = [x.requires_grad for x in flat]
        return Brief(rebuild, _tree.paths(losses), like, tracked, []), flat

    def inside(args: tuple[Any, ...]) -> Brief:
        """Run inside torch.func.vjp, and look there."""
        bound = bind(request._replace(args=args))
        briefs: list[Brief] = []

        def look(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            found, losses = brief(fn(*bound.fill(leaves)))
            briefs.append(found)
            return leaves[0].sum(), losses

        with numbered():
            result: Any = torch.func.vjp(look, bound.leaves, has_aux=True)
        return briefs[0]._replace(outside=outside(result[2]))

    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.suppress(Exception), untouched(fn, request.args), shapes:
        return inside(_tree.map(_empty_like, request.args))
    args = _tree.map(_whole, request.args)
    with contextlib.suppress(Exception), untouched(fn, args):
        return inside(args)
    with untouched(fn, args), numbered():
        return brief(call(fn, args, {}))[0]._replace(tracked=None)


def _empty_like(leaf: Any) -> Any:
    """Return a tensor of the same shape, under a mode that allocates nothing."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _whole(leaf: Any) -> Any:
    """Return numbers of a whole tensor: what this process has of it, over and over.

    The numbers of others are not asked for, since others may not come here: what one process reads,
    and so whether it runs for real, is up to its batch.
    """
    if not hasattr(leaf, "to_local"):
        return leaf
    own = leaf.to_local().flatten()
    own = own if len(own) else own.new_ones(1)
    return own.repeat(-(-leaf.numel() // len(own)))[: leaf.numel()].reshape(leaf.shape)
