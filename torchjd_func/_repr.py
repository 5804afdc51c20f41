"""Rules in one line, with the options that their functions are bound to."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor


def in_one_line(self: Any) -> str:
    """Return the kind of a rule, its name and its options."""
    shown = [f"{name}={_shown(value)}" for name, value in _options(self.update_fn).items()]
    return f"{type(self).__name__}({', '.join([self.name, *shown])})"


def _options(fn: Any) -> dict[str, Any]:
    """Return what a function, and those that it calls, were bound to, but for `None`."""
    if hasattr(fn, "update_fn"):
        return _options(fn.update_fn)
    if not isinstance(fn, partial):
        return {}
    inner = [option for value in fn.args for option in _options(value).items()]
    return dict(inner) | {name: value for name, value in fn.keywords.items() if value is not None}


def _shown(value: Any) -> str:
    """Return an option in one line."""
    if isinstance(value, Tensor) and value.numel() > 8:
        return f"tensor of shape {tuple(value.shape)}"
    return getattr(value, "__name__", None) or " ".join(repr(value).split())
