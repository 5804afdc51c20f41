"""The losses of many models, and what they dominate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree, metrics
from torchjd_func.plot._canvas import canvas, legend, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PyTree = Any


def front(
    losses: PyTree,
    reference: Tensor | Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the losses of many models, those that no other model dominates filled.

    Two losses are the axes of a plane, in which a line separates what is dominated. Of more losses,
    each has a place on the horizontal axis, and each model is a line.

    Args:
        losses: `(k, m)`, `m` losses of each of `k` models; or a pytree of `(k,)`, such as the dict
            that `jd.ensemble` gives, whose keys name the axes.
        reference: `(m,)`, worse than every point of interest: it is drawn in the plane, and the
            hypervolume below it is written into the legend (moocore, if `m` is above 2).
        names: Of the losses; by default their keys, or their numbers.
        label: What was trained, for the legend; draws several fronts on the same axes.
        ax: Axes; by default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are fewer than two losses, or sizes differ.

    References:
        E. Zitzler, L. Thiele, Multiobjective Evolutionary Algorithms: A Comparative Case Study and
        the Strength Pareto Approach, IEEE Transactions on Evolutionary Computation 3, 1999.

    Example:
        >>> import torch, torchjd_func as jd
        >>> losses = {"fit": torch.tensor([1.0, 2.0, 3.0]), "size": torch.tensor([3.0, 1.0, 2.0])}
        >>> ax = jd.plot.front(losses, [4.0, 4.0], label="UPGrad")
        >>> ax.get_xlabel(), ax.get_legend_handles_labels()[1]
        ('fit', ['UPGrad, hypervolume 7'])
    """
    points, keys = _points(losses)
    if names is not None:
        _check.axis_names("names", names, points.shape[1])
    with canvas(ax, (4.4, 3.6)) as axis:
        text = _text(label, points, reference)
        draw = _plane if points.shape[1] == 2 else _parallel
        draw(axis, points, _efficient(points), text)
        if points.shape[1] == 2:
            axis.set(xlabel=(names or keys)[0], ylabel=(names or keys)[1])
        else:
            axis.set_xticks(range(points.shape[1]), list(names or keys))
            axis.set(ylabel="loss")
        if reference is not None and points.shape[1] == 2:
            axis.plot(*map(float, reference), marker="x", color="0.4", linestyle="none")
        legend(axis)
    return axis


def _points(losses: PyTree) -> tuple[Tensor, list[str]]:
    """Return the losses as `(k, m)`, and their names."""
    leaves, stacked = _tree.leaves(losses), isinstance(losses, Tensor) and losses.ndim > 0
    _check.losses(_tree.paths(losses), leaves)
    if any(leaf.shape != leaves[0].shape for leaf in leaves):
        rule, got = "be vectors (k,) of one length", [tuple(leaf.shape) for leaf in leaves]
        _check.fail(ValueError, "`losses`", rule, got, "Pass one number for each model.")
    if stacked:
        points, keys = losses, [f"loss {i}" for i in range(losses.shape[-1])]
    else:
        points, keys = torch.stack(leaves, dim=-1), _tree.paths(losses)
    if points.ndim != 2 or points.shape[1] < 2:
        rule, remedy = "have shape (k, m), m at least 2", "Pass one row for each model."
        _check.fail(ValueError, "`losses`", rule, tuple(points.shape), remedy)
    return torch.from_numpy(numbers(points)), keys


def _efficient(points: Tensor) -> Tensor:
    """Say which points no other point dominates, `(k,)` bool."""
    no_worse = (points.unsqueeze(1) <= points).all(-1)
    better = (points.unsqueeze(1) < points).any(-1)
    return ~(no_worse & better).any(0)


def _text(label: str | None, points: Tensor, reference: Any) -> str | None:
    """Return the label, with the hypervolume if there is a reference."""
    if reference is None:
        return label
    corner = torch.from_numpy(numbers(_check.vector("reference", reference)))
    volume = float(metrics.hypervolume(points, corner))
    return ", ".join(filter(None, (label, f"hypervolume {volume:.3g}")))


def _plane(axis: Axes, points: Tensor, efficient: Tensor, text: str | None) -> None:
    """Draw points, and the line below which nothing is."""
    best = points[efficient]
    best = best[best[:, 0].argsort()]
    (line,) = axis.step(*numbers(best.mT), where="post", linewidth=1, alpha=0.6)
    color = line.get_color()
    axis.scatter(*numbers(best.mT), color=color, label=text, zorder=3)
    axis.scatter(*numbers(points[~efficient].mT), edgecolors=color, facecolors="none", zorder=3)


def _parallel(axis: Axes, points: Tensor, efficient: Tensor, text: str | None) -> None:
    """Draw a line for each point, faint if it is dominated."""
    color = None
    for first, (row, kept) in enumerate(zip(points, efficient.tolist(), strict=True)):
        shown = text if first == 0 else None
        alpha = 0.9 if kept else 0.2
        (line,) = axis.plot(numbers(row), marker="o", color=color, alpha=alpha, label=shown)
        color = line.get_color()
