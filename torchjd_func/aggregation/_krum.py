"""Krum and Multi-Krum: keep the gradients that agree with most others.

P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, Machine Learning with Adversaries,
NeurIPS 2017.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator


def _weights(
    gramian: Tensor,
    *,
    n_byzantine: int,
    n_selected: int,
    squared: bool,
    present: Tensor | None = None,
) -> Tensor:
    """Check the number of rows, and select."""
    m = gramian.shape[0]
    _check.enough_objectives("krum", m, n_byzantine + 3, "n_byzantine + 3")
    _check.enough_objectives("krum", m, n_selected, "n_selected")
    select = partial(_select, n_nearest=m - n_byzantine - 2, n_selected=n_selected, squared=squared)
    if present is None:
        return _host.call(select, gramian.detach())
    # How many rows there are is not known before the call: too few give not-a-number.
    n_near = present.sum() - n_byzantine - 2
    enough = (n_near > 0) & (present.sum() >= n_selected)
    near = torch.arange(m, device=gramian.device) < n_near
    return torch.where(enough, _host.call(select, gramian.detach(), present, near), torch.nan)


def _select(
    xp: Any,
    gramian: Array,
    present: Array | None = None,
    near_places: Array | None = None,
    *,
    n_nearest: int,
    n_selected: int,
    squared: bool,
) -> Array:
    """Average the `n_selected` rows of the smallest scores; of equal scores the first rows."""
    finite = xp.isfinite(gramian)
    if present is not None:
        finite = finite & present & present[:, None]
    rows = finite.diagonal()
    near = finite & rows & rows[:, None]
    known = xp.where(near, gramian, 0.0)
    norms = known.diagonal()
    distances = norms[:, None] + norms - 2 * known
    distances = xp.where(distances < 0, 0.0, distances)
    distances = distances if squared else xp.sqrt(distances)
    others = xp.where(near & (_host.identity(gramian) == 0), distances, xp.inf)  # (m, m)
    ordered = xp.sort(others, -1) if xp is np else xp.sort(others, -1).values
    if near_places is None:
        scores = ordered[:, :n_nearest].sum(-1)
    else:
        # Not-a-number is last in sorting, after infinity.
        scores = xp.where(present, xp.where(near_places, ordered, 0.0).sum(-1), xp.nan)
    ranks = _host.argsort(_host.argsort(scores))
    return xp.where(ranks < n_selected, 1 / n_selected, 0 * norms)


def krum(n_byzantine: int, n_selected: int = 1, *, squared: bool = True) -> Aggregator:
    r"""Average the gradients that are closest to most of the others.

    $$s_i = \sum_{j \in N_i} \lVert g_i - g_j \rVert^2, \qquad
    w = \tfrac1q \mathbf 1[\, i \text{ among the } q \text{ smallest } s_i \,],$$

    with $N_i$ the $m - f - 2$ nearest other rows. Resists `f` arbitrary rows, of
    faulty workers say, among `m`; the paper's theorem asks for $m \ge 2f + 3$. Not a multi-task
    method: it may conflict with every row it drops. Of equal scores the smaller index wins. Where
    fewer rows than are needed are present, which shapes do not tell, the result is NaN. A row
    that is not finite is far from all others and gets the weight 0; the product is NaN all the
    same, but `jd.distributed.across_workers` leaves such rows out.

    Args:
        n_byzantine: `f`, how many rows may be arbitrary.
        n_selected: `q`, how many rows are averaged; 1 is Krum, more is Multi-Krum.
        squared: Score by squared distances, as in the paper, or by distances.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If there are fewer than `n_byzantine + 3` or `n_selected` objectives.

    Differs from other implementations:
        TorchJD scores by distances that are not squared (`squared=False`): another row may win.
        TorchJD leaves open which of equally good rows wins.

    References:
        P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, Machine Learning with Adversaries:
        Byzantine Tolerant Gradient Descent, NeurIPS 2017,
        https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[1.0, 0.0], [1.1, 0.1], [0.9, -0.2], [-99.0, 50.0]])
        >>> jd.krum(n_byzantine=1, n_selected=3)(jac)[0]
        tensor([ 1.0000, -0.0333])
    """
    _check.flag("squared", squared)
    options = {
        "n_byzantine": _check.integer("n_byzantine", n_byzantine, 0),
        "n_selected": _check.integer("n_selected", n_selected, 1),
    }
    weights_fn = partial(_weights, squared=squared, **options)
    return weighted(stateless("krum", weights_fn, robust=True))
