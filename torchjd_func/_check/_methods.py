"""What methods are given: statistics, Jacobians, losses, keys and states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func._check._messages import describe, differentiable, fail, holds_numbers, one_device


def floating(name: str, value: Any) -> None:
    """Check that `value` is a dense tensor of a real floating-point dtype."""
    if not isinstance(value, Tensor) or not holds_numbers(value):
        fail(TypeError, name, "be a dense tensor", describe(value), "Use torch.as_tensor on it.")
    if not value.is_floating_point():
        fail(TypeError, name, "be floating-point", value.dtype, "Convert it with .float().")


def matrix(name: str, value: Tensor) -> None:
    """Check that `value` is a floating square matrix, or a batch of them."""
    floating(f"`{name}`", value)
    if value.ndim < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] == 0:
        rule, remedy = "have shape (..., m, m) with m > 0", "Pass a square matrix, e.g. a Gramian."
        fail(ValueError, f"`{name}`", rule, describe(value), remedy)


def broadcastable(name: str, got: Sequence[int], of: str, want: Sequence[int]) -> None:
    """Check that leading dimensions are those of another argument, or fewer."""
    pairs = list(zip(reversed(got), reversed(want), strict=False))
    if len(got) > len(want) or not all(a in (1, b) for a, b in pairs):
        rule = f"have the leading dimensions {tuple(want)} of `{of}`, or fewer"
        fail(ValueError, f"`{name}`", rule, tuple(got), "Expand it, or use torch.func.vmap.")


def square(method: str, statistic: Tensor) -> None:
    """Check that a weighting is given one `(m, m)` floating matrix."""
    if isinstance(statistic, Tensor) and statistic.is_floating_point() and statistic.ndim == 2:
        rows, columns = statistic.shape
        if rows == columns > 0 and holds_numbers(statistic):
            return  # before any text is made: a call takes microseconds
    name = f"the Gramian given to `{method}`"
    if not isinstance(statistic, Tensor):
        remedy = "For a Jacobian pytree call the aggregator, not its weighting."
        fail(TypeError, name, "be a tensor", describe(statistic), remedy)
    if statistic.ndim != 2 or not statistic.shape[0] == statistic.shape[1] > 0:
        remedy = "For a Jacobian call the aggregator; for several Gramians use torch.func.vmap."
        fail(ValueError, name, "have shape (m, m) with m > 0", describe(statistic), remedy)
    floating(name, statistic)
    differentiable(name, [""], [statistic], "Pass a dense matrix.")


def jacobian(method: str, paths: Callable[[], Sequence[str]], leaves: Sequence[Any]) -> None:
    """Check that all `leaves` are floating and share their leading dimension."""
    name = f"the Jacobian given to `{method}`"
    if not leaves:
        remedy = "Pass the pytree that jd.jac returns."
        fail(ValueError, name, "hold at least one tensor", "an empty pytree", remedy)
    first = leaves[0]
    if all(_is_rows(x) and len(x) == len(first) and x.device == first.device for x in leaves):
        return
    differentiable(
        name, paths(), leaves, "Convert arrays by torch.as_tensor, and leave constants out."
    )
    for path, leaf in zip(paths(), leaves, strict=True):
        if leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0]:
            rule, got = (
                "have one leading dimension m in all leaves",
                f"{describe(leaf)} at {path!r}",
            )
            fail(ValueError, name, rule, got, "The first dimension counts the objectives.")
    remedy = "Leave the step out where a batch has no losses."
    fail(ValueError, name, "have a row", f"{describe(leaves[0])} at {paths()[0]!r}", remedy)


def _is_rows(leaf: Any) -> bool:
    """Say whether a leaf is a tensor that may hold gradients in its rows."""
    return (
        isinstance(leaf, Tensor)
        and leaf.ndim > 0
        and leaf.shape[0] > 0
        and holds_numbers(leaf)
        and (leaf.is_floating_point() or leaf.is_complex())
    )


def losses_vector(method: str, losses: Tensor | None, m: int, like: Tensor) -> None:
    """Check the `losses` handed to a method beside its statistic."""
    if losses is None:
        return
    name, remedy = f"the losses given to `{method}`", "Flatten them in leaf order."
    if not isinstance(losses, Tensor):
        fail(TypeError, name, "be a tensor", describe(losses), remedy)
    if tuple(losses.shape) != (m,):
        fail(ValueError, name, f"have shape ({m},)", describe(losses), remedy)
    if losses.is_complex() or not holds_numbers(losses):
        fail(TypeError, name, "be dense and real", describe(losses), "Pass what is minimised.")
    if losses.device != like.device:
        one_device(f"{name}, and its gradients,", [losses, like])


def present(method: str, leaves: Sequence[Any], m: int, device: torch.device) -> list[Tensor]:
    """Return the leaves of a mask as tensors, with a bool for each objective."""
    name, remedy = f"`present` given to `{method}`", "Use a bool tensor, or bools like the losses."
    for leaf in leaves:
        if not isinstance(leaf, Tensor | bool | np.bool_) or getattr(leaf, "is_meta", False):
            fail(TypeError, name, f"hold {m} bools", describe(leaf), remedy)
    flags = [torch.as_tensor(leaf, device=device) for leaf in leaves]
    kinds = {str(flag.dtype) for flag in flags} - {"torch.bool"}
    size = sum(flag.numel() for flag in flags)
    if kinds or size != m:
        got = f"{size} of dtype {', '.join(kinds) or 'torch.bool'}"
        fail(ValueError, name, f"hold {m} bools", got, remedy)
    return flags


def takes_present(method: str, fn: Callable[..., Any]) -> None:
    """Check that the function of a rule can be told which objectives there are."""
    inner = fn
    while isinstance(inner, partial):
        inner = inner.func
    if not _has_keyword(inner, "present"):
        rule = "be left out: the rule has no keyword `present`"
        remedy = "Add `present=None`, (m,) bool, to its function, and leave out what is absent."
        fail(ValueError, f"`present` given to `{method}`", rule, "a mask", remedy)


def _has_keyword(fn: Callable[..., Any], name: str) -> bool:
    """Say whether a function can be given a keyword; asking for its signature takes long."""
    code = getattr(fn, "__code__", None)
    if code is None:
        parameters = inspect.signature(fn).parameters.values()
        return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return name in named or bool(code.co_flags & inspect.CO_VARKEYWORDS)


def losses_present(method: str, losses: Tensor | None) -> Tensor:
    """Return the `losses` that `method` cannot do without."""
    if losses is None:
        remedy = "Call it with losses=..., or through jd.grad, which passes them."
        fail(ValueError, f"`{method}`", "be given the losses", "None", remedy)
    return losses


def key(value: Any) -> None:
    """Check that a key was made by `torchjd_func.random`."""
    if not isinstance(value, Tensor) or value.shape != (2,) or value.dtype != torch.int64:
        remedy = "Make one with jd.random.key(seed); for several use torch.func.vmap."
        fail(ValueError, "`key`", "be an int64 tensor of shape (2,)", describe(value), remedy)


def key_at(value: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a key, if there is one, where what is drawn from it is used."""
    if value is None:
        return None
    key(value)
    return value.to(device)


def key_present(method: str, value: Tensor | None) -> Tensor:
    """Return the key that the random `method` cannot do without."""
    if value is None:
        rule = f"be given to `{method}`, which draws random numbers"
        remedy = (
            "Pass key=jd.random.key(0) to what makes the first state: jd.init_state, init, "
            "jd.interop.backward_ or jd.interop.torchjd_aggregator; then pass the state on."
        )
        fail(ValueError, "`key`", rule, "None", remedy)
    key(value)
    return value


def state(method: str, field: str, value: Any, shape: Sequence[int]) -> None:
    """Check that a tensor of the state has the size of this problem."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        name, rule = f"`state.{field}` of `{method}`", f"have shape {tuple(shape)}"
        remedy = (
            "A state belongs to one size of problem: call jd.init_state again, or, if one batch is "
            "smaller, leave it out (drop_last=True of a DataLoader), or pad it and say so by "
            "`present`."
        )
        fail(ValueError, name, rule, describe(value), remedy)


def state_type(method: str, value: Any, kind: type) -> None:
    """Check that a state was made by the `init` of this method."""
    if not isinstance(value, kind):
        remedy = "Pass the state that this method's init returned."
        fail(ValueError, f"`state` of `{method}`", f"be a {kind.__name__}", describe(value), remedy)


def state_structure(method: str, field: str, same: bool) -> None:
    """Check that a pytree of the state has the structure of the Jacobian."""
    if not same:
        name, remedy = (
            f"`state.{field}` of `{method}`",
            "Call jd.init_state again for these parameters.",
        )
        fail(ValueError, name, "have the structure of the Jacobian", "another", remedy)


def state_groups(method: str, got: int, want: int) -> None:
    """Check that a state has a part for each method, or for each group."""
    if got != want:
        remedy = "A state belongs to one grouping of parameters: call jd.init_state again."
        fail(ValueError, f"`state.inner` of `{method}`", f"have {want} parts", got, remedy)


def stateless(method: str, value: Any) -> None:
    """Check that a method without state is handed none."""
    if not isinstance(value, tuple) or len(value):
        remedy = "Pass the state that this method's init returned."
        fail(ValueError, f"`state` of `{method}`", "be ()", describe(value), remedy)


def rule(value: Any, types: tuple[type, ...]) -> None:
    """Check that a rule is of one of the core types."""
    if not isinstance(value, types):
        names = " or ".join(f"jd.{kind.__name__}" for kind in types)
        lift = "lift a jd.Weighting by jd.weighted, or hand it to jd.double_sampling"
        remedy = (
            "Call the factory, e.g. jd.upgrad(). jd.grad takes the objective before it, "
            f"jd.init_state after it. Or {lift}."
        )
        fail(TypeError, "`rule`", f"be a {names}", type(value).__name__, remedy)


def two_batch_weighting(value: Any, kind: type) -> None:
    """Check that a method weighs by the cross-Gramian of two batches."""
    if not isinstance(value, kind):
        remedy = "Pass e.g. jd.modo(); of an Aggregator, its `.weighting`."
        fail(TypeError, "`weighting`", f"be a jd.{kind.__name__}", repr(value), remedy)
    if value.needs in ("gramian", "norms"):
        rule = "take a cross-Gramian, which is not symmetric"
        fail(ValueError, "`weighting`", rule, repr(value), "Pass jd.modo() or jd.sdmgrad().")
