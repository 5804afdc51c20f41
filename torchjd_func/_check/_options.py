"""Options and hyper-parameters."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _host, _numbers, _tree
from torchjd_func._check._messages import describe, fail


def choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that `value` is one of `choices`."""
    if not any(isinstance(value, type(option)) and value == option for option in choices):
        allowed = "be one of " + ", ".join(repr(option) for option in choices)
        fail(ValueError, f"`{name}`", allowed, _shown(value), "Choose one of these.")


def choices(name: str, value: Any, options: Iterable[Any]) -> tuple[Any, ...]:
    """Return one of the options, or several, as a tuple."""
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    for option in several:
        choice(name, option, options)
    return several


def flag(name: str, value: Any) -> bool:
    """Return a switch that is on or off."""
    if not isinstance(value, bool):
        remedy = "It shapes the computation, so it cannot be a tensor."
        fail(TypeError, f"`{name}`", "be True or False", _shown(value), remedy)
    return value


def function(name: str, value: Any, remedy: str = "Pass e.g. torch.abs.") -> Any:
    """Return a function, or `None`."""
    if value is not None and not callable(value):
        fail(TypeError, f"`{name}`", "be a function or None", _shown(value), remedy)
    return value


def where(value: Any) -> Any:
    """Return a predicate of the paths of leaves, or `None`."""
    return function("where", value, "Pass e.g. lambda path: path.startswith('trunk').")


def interval(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    optional: bool = False,
    plain: bool = False,
) -> Any:
    """Return a number, or a 0-d tensor (not if `plain`), that lies in an interval."""
    if isinstance(value, Tensor) and not plain:
        real(name, value, (0,), "be a number, or a 0-d tensor of a real dtype")
    elif value is None and optional:
        return None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        rule = "be a number" if plain else "be a number, or a 0-d tensor"
        fail(TypeError, f"`{name}`", rule, _shown(value), "Make it one, e.g. with float().")
    return _within(name, value, low, high, open_low, open_high)


def _within(
    name: str, value: Any, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> Any:
    """Return a number, or a tensor of such, in an interval; unread where they are not at hand."""
    open_low, open_high = open_low or low == -math.inf, open_high or high == math.inf
    numbers = [value]
    if isinstance(value, Tensor):
        known = _host.numbers(value.detach())
        numbers = [] if known is None else known.ravel().tolist()
    for number in numbers:
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        if not (above and below):
            rule = f"be in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
            fail(ValueError, f"`{name}`", rule, number, "Pass a number of that range.")
    return value


def _shown(value: Any) -> str:
    """Return a plain value as it is written, any other by its type."""
    plain = value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype)
    return repr(value) if plain else describe(value)


def real(name: str, value: Tensor, ndims: tuple[int, ...], rule: str) -> Tensor:
    """Return a dense real tensor of some number of dimensions, unread."""
    usable = value.layout == torch.strided and not value.is_meta
    if value.is_complex() or value.dtype == torch.bool or not usable:
        fail(TypeError, f"`{name}`", rule, describe(value), "Make it dense and real.")
    if value.ndim not in ndims:
        remedy = "To sweep several, use torch.func.vmap over them."
        fail(ValueError, f"`{name}`", rule, describe(value), remedy)
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
    if not isinstance(name, str) or name != "auto":
        import qpsolvers  # takes as long to import as all of this package

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
    # Integers of Python, of which `in` is right where a compiler takes others as symbols
    places = range(n_args)
    return tuple(place for index in wanted for place in places if place == index % n_args)


def argnums(value: Any, n_args: int) -> tuple[int, ...]:
    """Return `argnums` as a tuple of non-negative positions."""
    remedy = "Pass what is differentiated by position; before it, jd.grad takes the state."
    found = positions("argnums", value, n_args, remedy)
    if not found or len(set(found)) != len(found):
        rule, remedy = "name at least one argument, each once", "Use 0 for the first argument."
        fail(ValueError, "`argnums`", rule, value, remedy)
    return found


def normalised(value: Any, n_args: int) -> Any:
    """Return `argnums` as it is, an int or a tuple, of non-negative positions."""
    found = argnums(value, n_args)
    return found if isinstance(value, tuple) else found[0]


def preference(value: _numbers.Numbers | None) -> Tensor | _numbers.Named | None:
    """Return `preference`, none negative and not all zero, as a vector (or `None`)."""
    if value is None:
        return None
    checked = per_loss("preference", value, low=0)
    numbers = checked.values if isinstance(checked, _numbers.Named) else checked
    known = _host.numbers(numbers.detach())
    if known is not None and known.size and not known.any():
        remedy = "Prefer at least one loss; the direction would be 0, and nothing would train."
        fail(ValueError, "`preference`", "hold a positive number", known.tolist(), remedy)
    return checked


def shares(value: _numbers.Numbers | None) -> Tensor | _numbers.Named | None:
    """Return `preference`, all of whose numbers are positive, as a vector (or `None`)."""
    return None if value is None else per_loss("preference", value, low=0, open_low=True)


def per_loss(
    name: str,
    value: _numbers.Numbers,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> Tensor | _numbers.Named:
    """Return a number for each loss as a vector; Python numbers with names, if it is a dict.

    Numbers have to lie in an interval.
    """
    if not isinstance(value, Tensor):
        for number in _tree.leaves(value):
            if isinstance(number, int | float):
                interval(name, number, low, high, open_low=open_low)
            elif isinstance(number, Tensor):
                _within(name, number, low, high, open_low)
    if isinstance(value, Mapping):
        return _numbers.named(value)
    numbers = vector(name, value)
    if isinstance(value, Tensor):
        return _within(name, numbers, low, high, open_low)
    return _numbers.Named((), numbers, {})


def vector(name: str, value: Tensor | Sequence[float]) -> Tensor:
    """Return `value` as a 1-D floating tensor; Python numbers become float64."""
    rule = "be 1-D, a number for each objective"
    tensor = value if isinstance(value, Tensor) else _as_tensor(name, value)
    real(name, tensor, (1,), rule)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def _as_tensor(name: str, value: Any) -> Tensor:
    """Return numbers as a float64 tensor."""
    rule, remedy = "be 1-D, a number for each objective", "Count objectives in leaf order."
    flat = value if isinstance(value, list | tuple) else ()
    if any(isinstance(number, float) and number != number for number in flat):  # a graph's, too
        fail(ValueError, f"`{name}`", rule, value, remedy)
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        fail(TypeError, f"`{name}`", rule, _shown(value), remedy)


def numbers(name: str, value: float | Tensor | Sequence[float]) -> float | Tensor:
    """Return one number, or a vector of them, none negative."""
    if isinstance(value, Tensor):
        return _within(
            name, real(name, value, (0, 1), "be a number, or a vector of numbers"), 0, math.inf
        )
    if not isinstance(value, list | tuple):
        return interval(name, value, 0)
    for number in value:
        interval(name, number, 0)
    return vector(name, value)


def secondary(name: str, value: float | Tensor, n: int) -> None:
    """Check that `value` is one number, or one for each of the `n` secondary objectives."""
    if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != (n,):
        rule = f"be one number, or have shape ({n},), one for each secondary objective"
        fail(ValueError, f"`{name}`", rule, describe(value), "The first objective has none.")


def length(name: str, value: Tensor, m: int) -> None:
    """Check that `value` has one entry for each of the `m` objectives."""
    if value.ndim == 0 or value.shape[-1] != m:
        rule = f"have one entry for each of the {m} objectives"
        got = value.shape[-1] if value.ndim else "one number"
        remedy = (
            "Objectives are counted in leaf order of the losses; a loss that is not reduced to one "
            "number counts once for each of its entries."
        )
        fail(ValueError, f"`{name}`", rule, got, remedy)


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


def installed(package: str, extra: str, purpose: str) -> Any:
    """Return an optional package."""
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = f"Run in a checkout: pip install -e '.[{extra}]'."
        fail(ImportError, f"`{package}`", f"be installed for {purpose}", "none", remedy)
