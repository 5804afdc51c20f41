"""Rules in one line, as the call that makes them: `Aggregator(smoothed(upgrad), alpha=0.5)`.

Options are what the functions of a rule are bound to. Those of a factory in the same file, of the
name of the rule, are compared with its defaults; of a rule without one, all are shown.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func._numbers import Named

LONGEST = 8  # numbers of a tensor that are shown


def in_one_line(self: Any) -> str:
    """Return the kind of a rule, its name, and options that differ from the defaults."""
    if torch.compiler.is_compiling():  # torch.func.vmap names what it maps, traced (torch 2.13)
        return self.name
    name, inner, options = _parts(self)
    head = f"{name}({', '.join(inner)})" if inner else name
    return f"{type(self).__name__}({', '.join([head, *options])})"


def _call(rule: Any) -> str:
    """Return a rule inside another one, as the call that makes it."""
    name, inner, options = _parts(rule)
    return f"{name}({', '.join([*inner, *options])})" if inner or options else name


def _parts(rule: Any) -> tuple[str, list[str], list[str]]:
    """Return the name of a rule, the rules that it is made of, and its options."""
    weighting = getattr(rule, "weighting", None)
    if _is_rule(weighting):  # the aggregator is derived from it
        return _parts(weighting)
    bound = _bound(rule)
    rules = [_shown(value) for value in bound.values() if _holds_rules(value)]
    name = rule.name.partition("(")[0] if rules else rule.name
    shown = _changed(bound, _factory(rule, name))
    return name, rules, [f"{key}={text}" for key, text in shown.items()]


def _changed(bound: dict[str, Any], factory: Callable[..., Any] | None) -> dict[str, str]:
    """Return the options of a factory that differ from its defaults; without one, all."""
    options = {key: value for key, value in bound.items() if not _holds_rules(value)}
    if factory is None:
        return {key: _shown(value) for key, value in options.items() if value is not None}
    parameters = inspect.signature(factory).parameters
    shown = {key: _shown(options[key]) for key in parameters if key in options}
    defaults = {key: _shown(parameters[key].default) for key in shown}
    # An option that names a function is bound to the function.
    return {key: x for key, x in shown.items() if x not in (defaults[key], defaults[key][1:-1])}


def _is_rule(value: Any) -> bool:
    """Say whether a value is a rule."""
    return hasattr(value, "update_fn")


def _holds_rules(value: Any) -> bool:
    """Say whether a value is a rule, or a dict of rules."""
    parts = value.values() if isinstance(value, Mapping) else [value]
    return any(_is_rule(part) for part in parts)


def _functions(rule: Any) -> list[Any]:
    """Return what a rule calls."""
    return [rule.init_fn, rule.update_fn, getattr(rule, "observe", None)]


def _bound(rule: Any) -> dict[str, Any]:
    """Return what the functions of a rule, and those bound to these, are bound to."""
    return {
        k: v
        for fn in _reachable(_functions(rule))
        if _is_partial(fn)
        for k, v in fn.keywords.items()
    }


def _factory(rule: Any, name: str) -> Callable[..., Any] | None:
    """Return the function of this name in a file that a function of the rule is from."""
    for fn in _reachable(_functions(rule)):
        space = sys.modules.get(getattr(fn, "__module__", None) or "")
        factory = getattr(space, name, None)
        if inspect.isfunction(factory):
            return factory
    return None


def _is_partial(value: Any) -> bool:
    return isinstance(value, partial)


def _reachable(values: Any) -> Iterator[Any]:
    """Yield functions, and those that they are bound to."""
    for value in values:
        if _is_partial(value):
            yield value
            yield from _reachable([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, tuple):
            yield from _reachable(value)
        elif inspect.isfunction(value):
            yield value


def _shown(value: Any) -> str:
    """Return an option in one line, without places in memory."""
    if _is_rule(value):
        return _call(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(part)}" for key, part in value.items()) + "}"
    if type(value) in (tuple, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Named):
        return repr(value) if value.names else _numbers(value.values)
    if isinstance(value, Tensor):
        return _numbers(value)
    if isinstance(value, partial):
        options = [f"{key}={_shown(part)}" for key, part in value.keywords.items()]
        return f"{_shown(value.func)}({', '.join([*map(_shown, value.args), *options])})"
    if hasattr(value, "__name__"):
        return value.__name__.lstrip("_")
    text = " ".join(repr(value).split())
    return type(value).__name__ if " at 0x" in text else text


def _numbers(value: Tensor) -> str:
    """Return the numbers of a short tensor; of others, and of those on other devices, the shape."""
    shape = f"tensor of shape {tuple(value.shape)}"
    if value.numel() > LONGEST or value.ndim > 1 or value.device.type != "cpu":
        return shape
    try:
        numbers = value.tolist()
    except RuntimeError:  # mapped by torch.func.vmap, or of a shape alone
        return shape
    return f"[{', '.join(f'{x:.4g}' for x in numbers)}]" if value.ndim else f"{numbers:.4g}"
