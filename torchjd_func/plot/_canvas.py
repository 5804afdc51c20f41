"""Where pictures are drawn, and in what style."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchjd_func import _check

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#222222"
STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.facecolor": "white",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
# Of M. Okabe and K. Ito, told apart by the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
FEW = 8  # lines in a panel, or rows of a matrix, that can be told apart


@contextlib.contextmanager
def canvas(ax: Any, size: tuple[float, float], columns: int = 1) -> Generator[Any]:
    """Give the axes to draw on; new ones have a style of their own."""
    pyplot = _check.installed("matplotlib.pyplot", "plot", "jd.plot")
    if ax is not None:
        yield ax
        return
    # Outside of the context: the first figure loads the backend, which sets parameters to be kept.
    figure = pyplot.figure(figsize=size, layout="constrained", facecolor="white")
    with pyplot.rc_context(STYLE | {"axes.prop_cycle": pyplot.cycler(color=COLORS)}):
        yield figure.subplots(1, columns)


def numbers(values: Tensor) -> Any:
    """Return a tensor as an array."""
    if values.is_meta:
        got, remedy = _check.describe(values), "Compute it on a device with memory."
        _check.fail(ValueError, "what is drawn", "hold numbers", got, remedy)
    return values.detach().cpu().double().numpy()


def legend(axis: Axes) -> None:
    """Name what has a label."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")
