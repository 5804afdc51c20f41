"""Paths of optimisers in the plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func.plot._canvas import INK, canvas, legend, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def trajectories(
    points: Tensor,
    objective: Callable[[Tensor], Any] | None = None,
    *,
    limits: tuple[float, float, float, float] | None = None,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw paths in the plane, of parameters or of losses, from circle to star.

    Args:
        points: `(runs, steps, 2)`, or `(steps, 2)` for a single run.
        objective: `fn(point) -> losses` of a point `(2,)`; draws contours of the mean loss. It is
            evaluated on a grid by `torch.func.vmap`.
        limits: `(left, right, bottom, top)` of the contours; by default around the points.
        label: What the paths are, for the legend.
        color: Of the paths, as matplotlib names it.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the points are not in the plane.

    Example:
        >>> import torch, torchjd_func as jd
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 2.0]]).expand(3, 2, 2)
        >>> ax = jd.plot.trajectories(points, lambda x: x.square(), label="mean")
        >>> ax.get_legend_handles_labels()[1]
        ['mean']
    """
    _check.in_the_plane("points", points, (2, 3))
    if not points.numel():
        got, remedy = _check.describe(points), "Record at least one."
        _check.fail(ValueError, "`points`", "hold at least one point", got, remedy)
    runs = numbers(points if points.ndim == 3 else points.unsqueeze(0))
    with canvas(ax, (5.2, 4.2)) as axis:
        if objective is not None:
            _contours(axis, objective, points, limits)
        for i, run in enumerate(runs):
            name = label if i == 0 else None
            color = axis.plot(*run.T, color=color, linewidth=1.8, label=name)[0].get_color()
        axis.scatter(*runs[:, 0].T, color="white", edgecolor=INK, s=36, zorder=3)
        axis.scatter(*runs[:, -1].T, color=color, edgecolor=INK, marker="*", s=130, zorder=4)
        kind = "coordinate" if objective is None else "parameter"
        axis.set(xlabel=f"{kind} 1", ylabel=f"{kind} 2")
        legend(axis)
    return axis


def _contours(
    axis: Axes,
    objective: Callable[[Tensor], Any],
    points: Tensor,
    limits: tuple[float, float, float, float] | None,
) -> None:
    """Draw contours of the mean loss."""
    left, right, bottom, top = limits or _around(points)
    grid = torch.cartesian_prod(torch.linspace(left, right, 160), torch.linspace(bottom, top, 160))
    mean = vmap(lambda point: _tree.ravel(objective(point)).mean())(grid.to(points))
    x, y, z = (numbers(value.reshape(160, 160)) for value in (*grid.unbind(1), mean))
    axis.contour(x, y, z, levels=24, colors="0.65", linestyles="-", linewidths=0.6, zorder=0)
    axis.grid(False)


def _around(points: Tensor) -> tuple[float, float, float, float]:
    """Return limits a tenth wider than the points."""
    flat = points.detach().reshape(-1, 2)
    low, high = flat.amin(0), flat.amax(0)
    margin = torch.where(high > low, 0.1 * (high - low), 1.0)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, bottom, top
