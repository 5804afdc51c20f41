"""Gradients in the plane, and their dual cone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchjd_func import _check
from torchjd_func.plot._canvas import COLORS, INK, canvas, legend, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cone(
    matrix: Tensor, directions: Mapping[str, Tensor] | None = None, *, ax: Axes | None = None
) -> Axes:
    r"""Draw gradients in the plane, and the cone of directions that conflict with none.

    The cone is the dual cone $\lbrace d : J d \ge 0 \rbrace$: a small step along `-d` with `d` in
    it worsens no objective, to first order.

    Args:
        matrix: `(m, 2)`, the Jacobian of `m` objectives of two parameters.
        directions: `{name: (2,)}`, such as the updates of methods, for the legend.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `directions` are not a dict of tensors.
        ValueError: If there are not two columns.

    Example:
        >>> import torch, torchjd_func as jd
        >>> matrix = torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
        >>> ax = jd.plot.cone(matrix, {"upgrad": jd.upgrad()(matrix)[0]})
        >>> ax.get_legend_handles_labels()[1]
        ['dual cone', 'gradients', 'upgrad']
    """
    _check.in_the_plane("matrix", matrix, (2,))
    found = {} if directions is None else directions
    _check.names("directions", found, found)
    for name, vector in found.items():
        _check.in_the_plane(f"directions[{name!r}]", vector, (1,))
    rows = numbers(matrix).tolist()
    arrows = {name: numbers(vector).tolist() for name, vector in found.items()}
    lengths = [math.hypot(*arrow) for arrow in (*rows, *arrows.values())]
    reach = 1.15 * max(filter(math.isfinite, lengths), default=1) or 1
    with canvas(ax, (5.2, 4.2)) as axis:
        cone = _columns(_dual_cone(rows, reach))
        axis.fill(*cone, color="#56B4E9", alpha=0.25, linewidth=0, label="dual cone")
        for i, row in enumerate(rows):
            _arrow(axis, row, INK, "gradients" if i == 0 else None, linewidth=2.5)
        for (name, arrow), color in zip(arrows.items(), itertools.cycle(COLORS), strict=False):
            _arrow(axis, arrow, color, name, linewidth=1.8)
        axis.set(xlabel="parameter 1", ylabel="parameter 2", aspect="equal")
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach))
        legend(axis)
    return axis


def _arrow(axis: Axes, tip: list[float], color: str, label: str | None, linewidth: float) -> None:
    """Draw an arrow from the origin."""
    turn = math.degrees(math.atan2(tip[1], tip[0])) - 90
    head: dict[str, Any] = {"marker": (3, 0, turn), "markersize": 9, "markevery": [1]}
    axis.plot([0, tip[0]], [0, tip[1]], color=color, label=label, linewidth=linewidth, **head)


def _dual_cone(rows: list[list[float]], reach: float) -> list[tuple[float, float]]:
    """Return the corners of the part of a square around 0 that conflicts with no row."""
    corners = [(-reach, -reach), (reach, -reach), (reach, reach), (-reach, reach)]
    for row in rows:
        corners = _half(corners, row)
    return corners


def _half(corners: list[tuple[float, float]], row: list[float]) -> list[tuple[float, float]]:
    """Cut a polygon along the line through 0 with this normal (Sutherland and Hodgman)."""
    kept = []
    for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True):
        here, there = x * row[0] + y * row[1], u * row[0] + v * row[1]
        if here >= 0:
            kept.append((x, y))
        if here * there < 0:
            share = here / (here - there)
            kept.append((x + share * (u - x), y + share * (v - y)))
    return kept


def _columns(corners: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return all x, and all y."""
    return [x for x, _ in corners], [y for _, y in corners]
