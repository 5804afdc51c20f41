"""Options and hyper-parameters."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import qpsolvers
import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func._check._messages import describe, fail


def choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in tuple(choices):
        allowed = "be one of " + ", ".join(repr(option) for option in choices)
        fail(ValueError, f"`{name}`", allowed, repr(value), "Choose one of these.")


def interval(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """Return a number that lies in an interval; a tensor is returned unread, `None` too."""
    if value is None or isinstance(value, Tensor):
        return value
    open_high = open_high or high == math.inf
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        rule = f"be in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        fail(ValueError, f"`{name}`", rule, value, "Pass a number of that range.")
    return value


def integer(name: str, value: Any, low: int = 1) -> int:
    """Return a number that is part of the shape of the computation."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        remedy = "It shapes the computation, so it cannot be a tensor."
        fail(ValueError, f"`{name}`", f"be an int of at least {low}", repr(value), remedy)
    return value


def floating_dtype(name: str, value: Any) -> None:
    """Check that `value` is a real floating-point dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        remedy = "Pass e.g. torch.bfloat16."
        fail(ValueError, f"`{name}`", "be a floating-point dtype", repr(value), remedy)


def solver(name: str) -> str:
    """Return the name of a solver that is installed."""
    if name != "auto":
        choice("solver", name, ("auto", *qpsolvers.available_solvers))
    return name


def chunk_size(value: int | None) -> None:
    """Check a number of cotangents at a time."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        remedy = "Use 1 for a loop, None for the method's own choice."
        fail(ValueError, "`chunk_size`", "be a positive int or None", repr(value), remedy)


def positions(name: str, value: Any, n_args: int, remedy: str) -> tuple[int, ...]:
    """Return an int or a tuple of ints as non-negative positions of arguments."""
    wanted = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in wanted):
        rule, names = "be an int or a tuple of ints", "Name positions, not argument names."
        fail(TypeError, f"`{name}`", rule, repr(value), names)
    if not all(-n_args <= index < n_args for index in wanted):
        rule = f"name some of the {n_args} positional arguments"
        fail(ValueError, f"`{name}`", rule, value, remedy)
    return tuple(index % n_args for index in wanted)


def argnums(value: Any, n_args: int) -> tuple[int, ...]:
    """Return `argnums` as a tuple of non-negative positions."""
    remedy = "Pass what is differentiated by position; before it, jd.grad takes the state."
    found = positions("argnums", value, n_args, remedy)
    if not found or len(set(found)) != len(found):
        rule, remedy = "name at least one argument, each once", "Use 0 for the first argument."
        fail(ValueError, "`argnums`", rule, value, remedy)
    return found


def preference(value: _tree.Numbers | None) -> Tensor | _tree.Named | None:
    """Return `preference`, none of whose numbers is negative, as a vector (or `None`)."""
    return None if value is None else per_loss("preference", value, low=0)


def per_loss(
    name: str,
    value: _tree.Numbers,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> Tensor | _tree.Named:
    """Return a number for each loss as a vector, with the names of the losses if it is a dict.

    Numbers have to lie in an interval; tensors are returned unread.
    """
    if not isinstance(value, Tensor):
        for number in _tree.leaves(value):
            if isinstance(number, int | float):
                interval(name, number, low, high, open_low=open_low)
    return _tree.named(value) if isinstance(value, Mapping) else vector(name, value)


def vector(name: str, value: Tensor | Sequence[float]) -> Tensor:
    """Return `value` as a 1-D floating tensor; Python numbers become float64."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if tensor.ndim != 1:
        remedy = "To sweep several, use torch.func.vmap over them."
        fail(
            ValueError, f"`{name}`", "be 1-D, a number for each objective", describe(tensor), remedy
        )
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def numbers(name: str, value: float | Tensor | Sequence[float]) -> float | Tensor:
    """Return one number, or a vector of them, none negative; tensors are returned unread."""
    if isinstance(value, Tensor):
        return value
    for number in [value] if isinstance(value, int | float) else value:
        interval(name, number, 0)
    return value if isinstance(value, int | float) else vector(name, value)


def secondary(name: str, value: float | Tensor, n: int) -> None:
    """Check that `value` is one number, or one for each of the `n` secondary objectives."""
    if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != (n,):
        rule = f"be one number, or have shape ({n},), one for each secondary objective"
        fail(ValueError, f"`{name}`", rule, describe(value), "The first objective has none.")


def length(name: str, value: Tensor, m: int) -> None:
    """Check that `value` has one entry for each of the `m` objectives."""
    if value.shape[-1] != m:
        rule = f"have one entry for each of the {m} objectives"
        remedy = "Objectives are counted in leaf order of the losses."
        fail(ValueError, f"`{name}`", rule, value.shape[-1], remedy)


def loss_names(option: str, names: Sequence[str], paths: Sequence[str]) -> None:
    """Check that the names in an option are those of the losses."""
    if tuple(names) != tuple(paths):
        if list(paths) == [""]:
            rule, remedy = "be a vector: the losses have no names", "Return a dict of losses."
        else:
            rule, remedy = f"name the losses {list(paths)}", "Give each loss its number."
        fail(ValueError, f"`{option}`", rule, list(names), remedy)


def enough_objectives(method: str, m: int, least: int, rule: str) -> None:
    """Check that a method that sets objectives aside has enough of them."""
    if m < least:
        wanted = f"be given at least {least} objectives ({rule})"
        fail(ValueError, f"`{method}`", wanted, m, "Set fewer aside, or use jd.mean().")


def same_size(name: str, got: int, want: int) -> None:
    """Check that there is one entry for each metric."""
    if got != want:
        rule, remedy = (
            f"have one entry for each of the {want} metrics",
            "Metrics are the last axis.",
        )
        fail(ValueError, f"`{name}`", rule, got, remedy)


def points(value: Tensor, reference: Tensor) -> None:
    """Check that `value` is a set of points of the dimension of `reference`."""
    if value.ndim != 2 or reference.ndim != 1 or value.shape[1] != reference.shape[0]:
        got = f"shapes {tuple(value.shape)} and {tuple(reference.shape)}"
        remedy = "For several sets use torch.func.vmap."
        fail(ValueError, "`points, reference`", "have shapes (k, m) and (m,)", got, remedy)


def in_the_plane(name: str, value: Tensor, ndims: tuple[int, ...]) -> None:
    """Check for points or vectors with two coordinates, which can be drawn."""
    if value.ndim not in ndims or value.shape[-1] != 2:
        got, remedy = describe(value), "Pass two coordinates of each."
        fail(ValueError, f"`{name}`", "have 2 columns", got, remedy)


def installed(package: str, extra: str, purpose: str) -> Any:
    """Return an optional package."""
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = f"Run: pip install 'torchjd_func[{extra}]'."
        fail(ImportError, f"`{package}`", f"be installed for {purpose}", "none", remedy)
