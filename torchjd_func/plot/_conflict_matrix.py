"""The angles between gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from torchjd_func import _check, metrics
from torchjd_func.plot._canvas import FEW, INK, canvas, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def conflict_matrix(
    gramian: Tensor, names: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw the cosines of the angles between gradients as a heat map: red where they conflict.

    Args:
        gramian: `(m, m)`, from `jd.gramian`.
        names: Of the `m` objectives; by default their numbers, from 0.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes, with a colour bar beside them.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the matrix is not square, or the number of names differs.

    Example:
        >>> import torch, torchjd_func as jd
        >>> ax = jd.plot.conflict_matrix(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]), ["fit", "small"])
        >>> [text.get_text() for text in ax.texts]
        ['1.00', '-0.50', '-0.50', '1.00']
    """
    cosines = numbers(metrics.pairwise_cosine(gramian))
    m = len(cosines)
    if names is not None:
        _check.axis_names("names", names, m)
    with canvas(ax, (4.6, 3.8)) as axis:
        image = axis.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
        axis.grid(False)
        if names is None:
            axis.locator_params(integer=True, min_n_ticks=1)
        else:
            axis.set_xticks(range(m), names, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(m), names)
        axis.set(xlabel="objective", ylabel="objective")
        for i, j in itertools.product(range(m), repeat=2) if m <= FEW else ():
            shade = "white" if abs(cosines[i, j]) > 0.6 else INK
            axis.text(j, i, f"{cosines[i, j]:.2f}", color=shade, ha="center", va="center")
        axis.get_figure().colorbar(image, ax=axis, label="cosine of gradients")
    return axis
