"""Losses, weights and measures over the steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchjd_func import _check
from torchjd_func.plot._canvas import FEW, canvas, legend, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training(
    records: Sequence[Mapping[str, Any]],
    *,
    units: Mapping[str, str] | None = None,
    log: Collection[str] = (),
    window: int = 1,
    label: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> tuple[Axes, ...]:
    """Draw what was recorded at each step of training, one panel for each quantity.

    A vector is drawn as one line for each entry, and one with more than 8 entries as its median in
    the range of all entries. One that has as many entries as the dict `"losses"` is named by it.

    Args:
        records: One `{quantity: value}` for each step, such as
            `{"losses": losses, **jd.read_measures(state)}`. A value is a tensor `()` or `(m,)`, or
            a dict of numbers, which names the lines.
        units: `{quantity: unit}`, for the labels.
        log: Quantities drawn on a logarithmic scale.
        window: Number of steps of a running mean.
        label: What was trained, for the legend; draws several runs on the same axes.
        ax: Axes, one for each quantity; by default a new figure.

    Returns:
        The axes, one for each quantity.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If records are no list of dicts.
        ValueError: If there are no records or fewer than `window`, if a quantity has more axes, as
            those of an ensemble have, if quantities differ, or the number of axes.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mgda(), {"weights": jd.measures.weights})
        >>> _, state = rule(torch.eye(2))
        >>> (ax,) = jd.plot.training([jd.read_measures(state)] * 3, units={"weights": "1"})
        >>> ax.get_ylabel(), ax.get_legend_handles_labels()[1]
        ('weights (1)', ['0', '1'])
    """
    _check.integer("window", window)
    quantities = _check.records(records, window)
    _check.recorded("log", log, quantities)
    _check.recorded("units", units or {}, quantities)
    losses = _sorted_keys(records[0].get("losses"))
    with canvas(ax, (4.2 * len(quantities), 3.2), len(quantities)) as axes:
        axes = tuple(axes) if hasattr(axes, "__len__") else (axes,)
        _check.axes(len(axes), len(quantities))
        for axis, quantity in zip(axes, quantities, strict=True):
            _panel(axis, [record[quantity] for record in records], losses, window, label)
            unit = f" ({units[quantity]})" if units and quantity in units else ""
            scale = "log" if quantity in log else "linear"
            axis.set(xlabel="step", ylabel=quantity.replace("_", " ") + unit, yscale=scale)
            legend(axis)
    return axes


def _sorted_keys(value: Any) -> list[Any] | None:
    """Return the names in a dict, in the order in which objectives are counted."""
    return sorted(value, key=str) if isinstance(value, Mapping) else None


def _panel(
    axis: Axes, values: list[Any], losses: list[Any] | None, window: int, label: str | None
) -> None:
    """Draw one quantity over the steps, named by its own keys or by those of the losses."""
    names = _sorted_keys(values[0])
    rows = [[value[name] for name in names] if names else value for value in values]
    table = torch.stack([torch.as_tensor(row).detach().cpu().double() for row in rows])
    lines = table.reshape(len(rows), -1).unfold(0, window, 1).mean(-1).mT
    steps = range(window - 1, len(rows))
    if len(lines) > FEW:
        (line,) = axis.plot(steps, numbers(lines.median(0).values), label=label or "median")
        low, high = numbers(lines.amin(0)), numbers(lines.amax(0))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        return
    if names is None and table.ndim > 1:
        names = losses if losses and len(losses) == len(lines) else range(len(lines))
    for name, line in zip([None] if names is None else map(str, names), lines, strict=True):
        axis.plot(steps, numbers(line), label=" ".join(filter(None, (label, name))) or None)
