"""Whose state a state is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args, get_origin

from torchjd_func._check._messages import describe, fail

EMPTY = tuple[()]


def state_of(name: str, init_fn: Callable[..., Any], value: Any) -> None:
    """Check that a state is of the type that `init_fn` is annotated to return.

    A rule that is bound to `init_fn` under the name of a field has its own state there.
    """
    fn, bound = init_fn, {}
    while isinstance(fn, partial):
        fn, bound = fn.func, fn.keywords
    kind = state_class(fn)
    if kind is not None and type(value) is not kind:
        rule = "be ()" if kind is tuple else f"be a {kind.__name__}"
        remedy = "Pass the state that this method's init returned."
        fail(ValueError, f"`state` of `{name}`", rule, describe(value), remedy)
    fields = getattr(kind, "_fields", ())
    for field, inner in bound.items():
        if field in fields and hasattr(inner, "init_fn"):
            state_of(inner.name, inner.init_fn, getattr(value, field))


def state_class(fn: Callable[..., Any]) -> type | None:
    """Return the named tuple, or the empty tuple, that `fn` is annotated to return, if it is."""
    kind = getattr(fn, "__annotations__", {}).get("return")
    if isinstance(kind, str):
        if kind == "tuple[()]":
            return tuple
        kind = fn.__globals__.get(kind)
    elif get_origin(kind) is tuple:
        # Their arguments: torch.compile does not trace comparisons of aliases (torch 2.13).
        return tuple if get_args(kind) == get_args(EMPTY) else None
    return kind if hasattr(kind, "_fields") else None


def has_state(rule: Any) -> None:
    """Check that states are saved and loaded for a rule."""
    if not hasattr(rule, "init_fn"):
        remedy = "Pass the rule first, as in state_dict(jd.upgrad(), state)."
        fail(TypeError, "`rule`", "be a rule", describe(rule), remedy)


def storable(path: str, value: Any, known: bool) -> None:
    """Check that a part of a state can be rebuilt from a file."""
    if not known:
        where = f"`state` at {path!r}" if path else "`state`"
        rule = "hold tensors only, in named tuples, dicts, lists and tuples"
        fail(TypeError, where, rule, describe(value), "Convert it, or leave it out.")


def saved_header(value: Any) -> Any:
    """Return what is known of a saved state, after a check that it is there."""
    if not isinstance(value, dict) or "state" not in value:
        remedy = "Pass what jd.interop.state_dict(rule, state) returned."
        got = "another dict" if isinstance(value, dict) else describe(value)
        fail(ValueError, "`saved`", "be made by jd.interop.state_dict", got, remedy)
    return value


def saved_format(value: Any, known: int) -> None:
    """Check that a state was saved in the format of this version."""
    if value != known:
        remedy = "Load it with the version of torchjd_func that saved it."
        fail(ValueError, "`saved`", f"be of format {known}", f"format {value}", remedy)


def saved_rule(value: Any, name: str) -> None:
    """Check that a state was saved of this method."""
    if value != name:
        remedy = "Load it for the method that it was saved of, or start from a fresh state."
        fail(ValueError, "`saved`", f"be a state of `{name}`", f"one of `{value}`", remedy)


def saved_tensor(name: str, tensor: Any, dtype: str, node: dict[str, Any]) -> None:
    """Check that a tensor is as it was saved."""
    got, want = (list(tensor.shape), dtype), (node["shape"], node["dtype"])
    if got != want:
        rule = f"have shape {tuple(want[0])} and dtype {want[1]} at {name!r}"
        remedy = "It was saved so: do not convert what was saved."
        fail(ValueError, "`saved`", rule, f"{tuple(got[0])} and {got[1]}", remedy)


def saved_class(kind: str, known: bool) -> None:
    """Check that a named tuple of a saved state is one of the rule's own."""
    if not known:
        rule = "hold named tuples of the rule alone"
        remedy = (
            "If it is of your parameters, use dicts for these; a rule's own state is a class of "
            "the module of its `init_fn`."
        )
        fail(ValueError, "`saved`", rule, f"a {kind}", remedy)
