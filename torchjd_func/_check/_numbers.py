"""What functions of plain numbers are given: metrics, seeds, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func._check._messages import describe, fail, holds_numbers, one_device
from torchjd_func._check._methods import floating
from torchjd_func._check._options import integer


def metric(name: str, value: Any) -> Tensor:
    """Return a floating tensor whose last axis counts something."""
    floating(f"`{name}`", value)
    if value.ndim == 0 or value.shape[-1] == 0:
        remedy = "The last axis counts the metrics."
        fail(ValueError, f"`{name}`", "have a last axis that is not empty", describe(value), remedy)
    return value


def flags(name: str, value: Any, like: Tensor) -> Tensor:
    """Return a bool for each entry of the last axis of `like`."""
    size, remedy = like.shape[-1], "Pass one for each metric."
    dense = isinstance(value, Tensor) and holds_numbers(value)
    if not dense and not (isinstance(value, list | tuple) and all(_is_flag(x) for x in value)):
        fail(TypeError, f"`{name}`", f"hold {size} bools", describe(value), remedy)
    kept = torch.as_tensor(value, dtype=torch.bool, device=like.device)
    if tuple(kept.shape) != (size,):
        fail(ValueError, f"`{name}`", f"hold {size} bools", describe(kept), remedy)
    return kept


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | int)


def same_size(name: str, got: int, want: int) -> None:
    """Check that there is one entry for each metric."""
    if got != want:
        rule = f"have one entry for each of the {want} metrics"
        fail(ValueError, f"`{name}`", rule, got, "Metrics are the last axis.")


def records(value: Any, window: int) -> list[Any]:
    """Return the quantities that all records have."""
    remedy = "Append the same quantities at each step, such as {'losses': losses}."
    if not isinstance(value, Sequence) or not all(isinstance(step, Mapping) for step in value):
        fail(
            TypeError, "`records`", "be a list of dicts, one for each step", describe(value), remedy
        )
    if len(value) < window or not value:
        fail(ValueError, "`records`", "fill the window", len(value), "Record more steps.")
    first, layout = list(value[0]), _layout(value[0])
    for name, quantity in value[0].items():
        _drawable(name, quantity)
    for place, step in enumerate(value):
        if _layout(step) != layout:
            rule, got = f"hold {layout} at each step", f"{_layout(step)} at {place}"
            fail(ValueError, "`records`", rule, got, remedy)
    return first


def recorded(name: str, given: Any, quantities: Sequence[Any]) -> None:
    """Check that names are those of recorded quantities."""
    several = not isinstance(given, str) and isinstance(given, Iterable)
    if not several or not set(given) <= set(quantities):
        rule = f"name some of the quantities {list(quantities)}"
        got = repr(given) if isinstance(given, str) else list(given) if several else describe(given)
        fail(ValueError, f"`{name}`", rule, got, "Pass a list of such names, or a dict by them.")


def _drawable(name: str, quantity: Any) -> None:
    """Check that a quantity is a number, a vector, or a dict of numbers."""
    parts = quantity.items() if isinstance(quantity, Mapping) else [(None, quantity)]
    for part, x in parts:
        where = f"{name!r}" if part is None else f"{name!r}, {part!r}"
        if not isinstance(x, Tensor | np.ndarray | np.number | int | float | list | tuple):
            got, remedy = f"{describe(x)} at {where}", "Leave texts and the like out."
            fail(TypeError, "`records`", "hold numbers", got, remedy)
        size = getattr(x, "shape", ())
        if len(size) > (part is None) and math.prod(size) > 1:
            rule = "hold quantities that are numbers, vectors (m,) or dicts of numbers"
            remedy = (
                "Of an ensemble, record one model, x[0], or the mean over the models, x.mean(0); "
                "jd.plot.front draws the losses of all."
            )
            fail(ValueError, "`records`", rule, f"shape {tuple(size)} at {where}", remedy)


def _layout(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names, or the shape, of each quantity."""
    return {
        name: sorted(map(str, x)) if isinstance(x, Mapping) else tuple(getattr(x, "shape", ()))
        for name, x in record.items()
    }


def axes(n_axes: int, n_quantities: int) -> None:
    """Check that there are as many axes as quantities."""
    if n_axes != n_quantities:
        rule, remedy = (
            f"hold {n_quantities} axes, one for each quantity",
            "Leave it out for new ones.",
        )
        fail(ValueError, "`ax`", rule, n_axes, remedy)


def points(value: Any, reference: Any) -> None:
    """Check that `value` is a set of points of the dimension of `reference`."""
    floating("`points`", value)
    floating("`reference`", reference)
    if value.ndim != 2 or reference.ndim != 1 or value.shape[1] != reference.shape[0]:
        got = f"shapes {tuple(value.shape)} and {tuple(reference.shape)}"
        remedy = "For several sets use torch.func.vmap."
        fail(ValueError, "`points, reference`", "have shapes (k, m) and (m,)", got, remedy)
    metric("reference", reference)
    one_device("`points, reference`", [value, reference])


def linear_program(objective: Tensor, matrix: Tensor, right: Tensor, n_free: Any) -> None:
    """Check that sizes of a linear program fit, and that its free unknowns are in a basis."""
    integer("n_free", n_free, 0)
    one_device("`objective, matrix, right`", [objective, matrix, right])
    shapes = tuple(objective.shape), tuple(matrix.shape), tuple(right.shape)
    fits = min(map(len, shapes)) > 0 and matrix.ndim > 1
    if not fits or (*right.shape[-1:], *objective.shape[-1:]) != matrix.shape[-2:]:
        name, rule = "`objective, matrix, right`", "have shapes (..., n), (..., k, n) and (..., k)"
        fail(ValueError, name, rule, shapes, "Take equations as rows of `matrix`.")
    k, n = matrix.shape[-2:]
    if not 0 < k <= n or n_free > k:
        name, rule = "the numbers of equations and unknowns", "satisfy n_free <= k <= n, 0 < k"
        remedy = "Drop equations that follow from others, or add slack unknowns."
        fail(ValueError, name, rule, f"n_free={n_free}, k={k}, n={n}", remedy)


def in_the_plane(name: str, value: Any, ndims: tuple[int, ...]) -> None:
    """Check for points or vectors with two coordinates, which can be drawn."""
    floating(f"`{name}`", value)
    if value.ndim not in ndims or value.shape[-1] != 2:
        got, remedy = describe(value), "Pass two coordinates of each."
        fail(ValueError, f"`{name}`", "have 2 columns", got, remedy)


def axis_names(name: str, value: Any, want: int) -> None:
    """Check that there is a text for each objective."""
    texts = value if isinstance(value, list | tuple) else None
    if texts is None or len(texts) != want or not all(isinstance(text, str) for text in texts):
        rule, remedy = f"be a list of {want} strings", "Name each objective, in leaf order."
        fail(ValueError, f"`{name}`", rule, value if texts is not None else describe(value), remedy)


def whole(name: str, value: Any) -> Any:
    """Return an int, or a 0-d tensor of integers."""
    if isinstance(value, Tensor):
        inexact = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        fine = not inexact and value.ndim == 0 and holds_numbers(value)
    else:
        fine = isinstance(value, int) and not isinstance(value, bool)
    if not fine:
        remedy = "For several use torch.func.vmap over a tensor."
        fail(TypeError, f"`{name}`", "be an int, or a 0-d tensor of one", describe(value), remedy)
    return value


def shape(value: Any) -> None:
    """Check that `value` is a shape."""
    sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not sequence or not all(isinstance(size, int) and size >= 0 for size in value):
        rule, remedy = "be a tuple of ints, none negative", "Use () for one number."
        fail(TypeError, "`shape`", rule, repr(value), remedy)
