"""Options with a number for each objective: as a vector, or by the names of the losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _check
from torchjd_func._tree import Named

Vector = Tensor | Named  # what is left of an option once it is checked


def entries(name: str, value: Vector, like: Tensor) -> Tensor:
    """Return one number for each row of `like`, in its dtype and on its device."""
    values = value.values if isinstance(value, Named) else value
    _check.length(name, values, like.shape[0])
    return values.to(like)


def check_names(rule: Any, loss_paths: Sequence[str]) -> None:
    """Check that the options of a rule that are given by name name the losses.

    Args:
        rule: A rule, with all that it is made of.
        loss_paths: The names of the losses, in leaf order.
    """
    for option, names in named_options(rule):
        _check.loss_names(option, names, loss_paths)


def named_options(rule: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Return the options of a rule, and of those in it, that are given by name, with the names."""
    return [(option, value.names) for option, value in _walk("", rule)]


def _walk(option: str, value: Any) -> Iterator[tuple[str, Named]]:
    """Visit what the functions of a rule are bound to."""
    if isinstance(value, Named):
        yield option, value
    elif isinstance(value, partial):
        for name, bound in [*((option, x) for x in value.args), *value.keywords.items()]:
            yield from _walk(name, bound)
    elif isinstance(value, Mapping | list | tuple):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _walk(option, member)
    elif hasattr(value, "update_fn"):
        yield from _walk(option, value.update_fn)
