"""Pictures of benchmarks, readable in light and in dark surroundings."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
