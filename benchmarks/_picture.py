"""Pictures of benchmarks, in the style of `jd.plot`."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from torchjd_func.plot import _canvas

STYLE: dict[Any, Any] = _canvas.STYLE | {"axes.prop_cycle": cycler(color=_canvas.COLORS)}


def curves(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw training loss and conflict over the steps, one line of axes for each problem."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2 * len(problems)), layout="constrained")
        axes = figure.subplots(len(problems), 2, squeeze=False, sharex="row")
        for (loss_axis, cosine_axis), problem in zip(axes, problems, strict=True):
            for row in [row for row in rows if row["problem"] == problem]:
                steps = np.linspace(0, row["steps"], len(row["losses"]) + 1)[1:]
                loss_axis.plot(steps, row["losses"], label=row["method"])
                cosine_axis.plot(steps, row["cosines"], label=row["method"])
            loss_axis.set(ylabel="training loss (nats)", xlabel="step", yscale="log")
            loss_axis.set_title(problem, loc="left")
            loss_axis.legend()
            cosine_axis.axhline(0, color="0.4", linewidth=1)
            cosine_axis.set(ylabel="lowest cosine of the update", xlabel="step")
            cosine_axis.set_title("with the gradient of any objective", loc="left")
            cosine_axis.xaxis.set_major_locator(MaxNLocator(5))
        figure.savefig(path, dpi=130, facecolor="white")


def speedups(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the peer's time over ours, a line for each method, a point for each size."""
    both = [row for row in rows if "torchjd_ms" in row]
    names = list(dict.fromkeys(row["method"] for row in both))
    sizes = [m for m in (4, 16, 64, 256) if any(row["m"] == m for row in both)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.3 * len(names) + 1.4), layout="constrained")
        axis = figure.subplots()
        for m, marker in zip(sizes, "osD^", strict=False):
            own = [row for row in both if row["m"] == m]
            ratios = [row["torchjd_ms"] / row["ours_ms"] for row in own]
            places = [names.index(row["method"]) for row in own]
            axis.plot(ratios, places, marker, label=f"m = {m}", alpha=0.85)
        axis.axvline(1, color="0.4", linewidth=1)
        axis.set(xscale="log", xlabel="TorchJD's time / ours: to the right of 1 we are faster")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(ScalarFormatter())
        figure.legend(loc="outside upper center", ncols=len(sizes))
        figure.savefig(path, dpi=130, facecolor="white")


OURS, THEIRS = ("torchjd_func", "#0072B2", "o"), ("TorchJD", "#D55E00", "s")
COMPILED = ("torchjd_func, compiled", "#56B4E9", "*")
NAMES = {
    "plain": ("plain forward and backward", "0.35", "o"),
    "layerwise": OURS,
    "compiled": COMPILED,
    "jacobian": ("torchjd_func, whole Jacobian", "#009E73", "v"),
    "autogram": THEIRS,
    "autojac": ("TorchJD, whole Jacobian", "#E69F00", "D"),
    "step": OURS,
    "weights": ("UPGrad weights alone", "#CC79A7", "x"),
    "step_compiled": COMPILED,
    "step_torchjd": THEIRS,
}


def panels(
    rows: list[dict[str, Any]],
    path: pathlib.Path,
    titles: dict[str, tuple[str, str, str]],
    groups: dict[str, tuple[str, ...]],
) -> None:
    """Draw the times of groups of routes, one line for each, over the sizes of each model."""
    rows = [row for row in rows if "plain_ms" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.7 * len(groups) + 0.9), layout="constrained")
        axes = figure.subplots(len(groups), len(models), squeeze=False, sharex="col", sharey="row")
        handles = {}
        for line, (what, routes) in zip(axes, groups.items(), strict=True):
            line[0].set_ylabel(f"time of one {what} (ms)")
            for axis, model in zip(line, models, strict=True):
                by = titles[model][1]
                own = sorted((row for row in rows if row["model"] == model), key=lambda r: r[by])
                handles |= _lines(axis, own, routes, by)
        for top, bottom, model in zip(axes[0], axes[-1], models, strict=True):
            top.set_title(titles[model][0], loc="left", fontsize=11)
            bottom.set_xlabel(titles[model][2])
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
        figure.savefig(path, dpi=130, facecolor="white")


def _lines(
    axis: Any, rows: list[dict[str, Any]], routes: tuple[str, ...], by: str
) -> dict[str, Any]:
    """Draw the routes of one model, and return their lines by name."""
    handles = {}
    for route in routes:
        points = [(row[by], row[f"{route}_ms"]) for row in rows if f"{route}_ms" in row]
        if points:
            name, color, marker = NAMES[route]
            (handles[name],) = axis.loglog(
                *zip(*points, strict=True), color=color, marker=marker, zorder=2 + 1 / len(points)
            )
    axis.xaxis.set_major_locator(FixedLocator(sorted({row[by] for row in rows})))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    return handles
