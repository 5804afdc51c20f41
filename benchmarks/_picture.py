"""Pictures of benchmarks, readable in light and in dark surroundings."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    ),
}


def smooth(values: list[float], window: int) -> np.ndarray:
    """Return running means over `window` values."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    return (total[window:] - total[:-window]) / window


def curves(runs: dict[str, dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """Draw training loss and conflict over the steps, one row for each problem."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2 * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), 2, squeeze=False, sharex="row")
        for (loss_axis, cosine_axis), (problem, by_method) in zip(axes, runs.items(), strict=True):
            for method, run in by_method.items():
                window = max(1, len(run.losses) // 50)
                steps = np.arange(window, len(run.losses) + 1)
                loss_axis.plot(steps, smooth(run.losses, window), label=method)
                cosine_axis.plot(steps, smooth(run.cosines, window), label=method)
            loss_axis.set(ylabel="training loss (nats)", xlabel="step", yscale="log")
            loss_axis.set_title(problem, loc="left")
            loss_axis.legend()
            cosine_axis.axhline(0, color="0.4", linewidth=1)
            cosine_axis.set(ylabel="lowest cosine of the update", xlabel="step")
            cosine_axis.set_title("with the gradient of any objective", loc="left")
            cosine_axis.xaxis.set_major_locator(MaxNLocator(5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white")
    return path


def growth(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """Draw the time of each method, and of the peer's, over the number of objectives."""
    names, columns = list(dict.fromkeys(row["method"] for row in rows)), 4
    lines = -(-len(names) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.3 * lines + 0.6), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axis, name in zip(axes, names, strict=False):
            for key, label, style in (
                ("torchjd_ms", "TorchJD", {"marker": "s", "color": "#D55E00"}),
                ("ours_ms", "torchjd_func", {"marker": "o", "color": "#0072B2"}),
            ):
                points = [(r["m"], r[key]) for r in rows if r["method"] == name and key in r]
                if points:
                    axis.loglog(*zip(*points, strict=True), label=label, markersize=4, **style)
            axis.set_title(name, loc="left", fontsize=11)
            axis.xaxis.set_major_locator(FixedLocator([2, 4, 16, 64, 256]))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_locator(NullLocator())
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        for axis in axes[max(0, len(names) - columns) : len(names)]:
            axis.tick_params(labelbottom=True)
        figure.supxlabel("number of objectives m")
        figure.supylabel("time of one call (ms)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white")
    return path


NAMES = {
    "plain": ("plain forward and backward", "0.35", "o"),
    "layerwise": ("jd.gramian, layer by layer", "#0072B2", "o"),
    "compiled": ("the same, compiled", "#56B4E9", "*"),
    "jacobian": ("jd.gramian, whole Jacobian", "#009E73", "v"),
    "autogram": ("TorchJD autogram", "#D55E00", "s"),
    "autojac": ("TorchJD autojac", "#E69F00", "D"),
    "step": ("jd.grad with UPGrad", "#0072B2", "o"),
    "weights": ("UPGrad weights alone", "#CC79A7", "x"),
    "step_compiled": ("the same, compiled", "#56B4E9", "*"),
    "step_torchjd": ("TorchJD with UPGrad", "#D55E00", "s"),
}


def panels(
    rows: list[dict[str, Any]],
    titles: dict[str, tuple[str, str, str]],
    groups: tuple[tuple[str, ...], ...],
    path: pathlib.Path,
) -> pathlib.Path:
    """Draw the times of groups of routes, one line for each, over the sizes of each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(models) + 2.8, 3 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), len(models), squeeze=False, sharex="col", sharey="row")
        for line, group, what in zip(axes, groups, ("Gramian", "step"), strict=True):
            for axis, model in zip(line, models, strict=True):
                title, by, name = titles[model]
                own = sorted((row for row in rows if row["model"] == model), key=lambda r: r[by])
                _lines(axis, own, group, by)
                axis.set_title(title if group == groups[0] else "", loc="left", fontsize=10)
                axis.set_xlabel(name if group == groups[-1] else "")
            line[0].set_ylabel(f"time of one {what} (ms)")
            handles = {
                text: handle
                for axis in line
                for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            line[-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white")
    return path


def _lines(axis: Any, rows: list[dict[str, Any]], routes: tuple[str, ...], by: str) -> None:
    """Draw the routes of one model."""
    for route in routes:
        points = [(row[by], row[f"{route}_ms"]) for row in rows if f"{route}_ms" in row]
        if points:
            name, color, marker = NAMES[route]
            axis.loglog(*zip(*points, strict=True), label=name, color=color, marker=marker)
    axis.xaxis.set_major_locator(FixedLocator(sorted({row[by] for row in rows})))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
