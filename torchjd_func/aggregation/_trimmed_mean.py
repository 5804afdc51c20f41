"""Coordinate-wise trimmed mean.

D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, Byzantine-Robust Distributed Learning,
ICML 2018, arXiv:1803.01498.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._lift import no_state
from torchjd_func._types import Aggregator, PyTree, State
from torchjd_func.aggregation._rows import by_columns

# Rows are streamed instead of sorted if few are left out, and there are columns enough for each of
# the operations on a row.
FEW, COLUMNS = 8, 256


def _update(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    *,
    trim_number: int,
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Trim each leaf by itself."""
    _check.stateless("trimmed_mean", state)
    m = _tree.leading_size(jac)
    _check.enough_objectives("trimmed_mean", m, 2 * trim_number + 1, "2 trim_number + 1")
    return _tree.map(partial(_trim, trim_number=trim_number, present=present), jac), state


def _trim(leaf: Tensor, *, trim_number: int, present: Tensor | None) -> Tensor:
    """Average what is left of each column without its extremes."""
    if present is not None:
        fn = partial(_sorted_present, trim_number=trim_number, present=present)
        return _tree.row_like(by_columns(fn, _tree.rows(leaf)), leaf)
    # Extremes are sorted out, never subtracted: they may be larger than the rest by any factor.
    few = trim_number <= FEW and COLUMNS * (4 * trim_number + 1) <= leaf[0].numel()
    few = few and not leaf.is_cuda and not torch.compiler.is_compiling()
    fn = _streamed if few else _sorted  # on a device one sort is faster than many passes
    mean = by_columns(partial(fn, trim_number=trim_number), _tree.rows(leaf))
    return _tree.row_like(mean, leaf)


def _sorted(rows: Tensor, *, trim_number: int) -> Tensor:
    """Sort each column."""
    kept = rows.shape[0] - 2 * trim_number
    return rows.sort(dim=0).values.narrow(0, trim_number, kept).mean(dim=0)


def _sorted_present(rows: Tensor, *, trim_number: int, present: Tensor) -> Tensor:
    """Sort each column, absent rows last; not-a-number if too few are present."""
    ordered = torch.where(present.unsqueeze(-1), rows, torch.nan).sort(dim=0).values
    place, n_present = torch.arange(len(rows), device=rows.device), present.sum()
    kept = (place >= trim_number) & (place < n_present - trim_number)
    total = torch.where(kept.unsqueeze(-1), ordered, 0.0).sum(dim=0)
    return total / torch.where(kept.any(), n_present - 2 * trim_number, torch.nan)


def _streamed(rows: Tensor, *, trim_number: int) -> Tensor:
    """Add up rows as they come, holding back the extremes so far; each row is read once."""
    rows = rows.nan_to_num(torch.inf, torch.inf, -torch.inf)  # the largest, as in sorting
    first = rows[: 2 * trim_number].sort(dim=0).values
    lowest, highest = [*first[:trim_number]], [*first[trim_number:].flip(0)]
    total = torch.zeros_like(rows[0])
    for row in rows[2 * trim_number :]:
        for k in range(trim_number):
            lowest[k], row = torch.minimum(lowest[k], row), torch.maximum(lowest[k], row)
            highest[k], row = torch.maximum(highest[k], row), torch.minimum(highest[k], row)
        total = total + row
    return total / (rows.shape[0] - 2 * trim_number)


def trimmed_mean(trim_number: int) -> Aggregator:
    r"""Average each coordinate without its `t` largest and `t` smallest values.

    $$d_k = \frac{1}{m - 2t} \sum_{i = t + 1}^{m - t} J_{(i) k}, \qquad
    J_{(1) k} \le \dots \le J_{(m) k}.$$

    Resists `t` arbitrary rows among `m`. `t = 0` is the mean and `m = 2t + 1` the coordinate-wise
    median. Not a combination of the gradients, so it needs their rows; it may conflict with all of
    them. Complex parameters count as pairs of real coordinates. Where fewer than `2t + 1` rows are
    present, which shapes do not tell, the result is NaN.

    Args:
        trim_number: `t`, how many values are left out on either side.

    Returns:
        The Aggregator, without state and without weighting.

    Raises:
        ValueError: If there are fewer than `2 trim_number + 1` objectives.

    Differs from other implementations:
        The paper gives a fraction `beta` of rows; like TorchJD this takes their number.

    References:
        D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, Byzantine-Robust Distributed Learning: Towards
        Optimal Statistical Rates, ICML 2018, https://arxiv.org/abs/1803.01498

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]])
        >>> jd.trimmed_mean(1)(jac)[0]
        tensor([1.5000, 2.5000])
    """
    update = partial(_update, trim_number=_check.integer("trim_number", trim_number, 0))
    return Aggregator("trimmed_mean", no_state, update, columnwise=True)
