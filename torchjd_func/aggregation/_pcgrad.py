"""PCGrad: projecting conflicting gradients.

T. Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv:2001.06782.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from torchjd_func import _check, _host, _present, random
from torchjd_func._host import Array
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting
from torchjd_func.aggregation._orders import shuffled_others
from torchjd_func.aggregation._surgery import project


class PCGradState(NamedTuple):
    """The source of the orders."""

    key: Tensor  # (2,)


def _init(statistic: Tensor, key: Tensor | None) -> PCGradState:
    """Keep the key."""
    return PCGradState(_check.key_present("pcgrad", key))


def _update(
    gramian: Tensor,
    state: PCGradState,
    losses: Tensor | None,
    *,
    reduction: str,
    present: Tensor | None = None,
) -> tuple[Tensor, PCGradState]:
    """Draw orders, and project; a row of zeros is never in the way."""
    _check.state_type("pcgrad", state, PCGradState)
    next_key, draw = random.split(state.key)
    orders = shuffled_others(draw, gramian.shape[0])
    weights = _host.call(_project, gramian, orders, device=project)
    mean = reduction == "mean"
    return (weights / _present.count(present, gramian) if mean else weights), PCGradState(next_key)


def _project(xp: Any, gramian: Array, orders: Array) -> Array:
    """Project every row, all rows at once, one step of their orders at a time."""
    squares = gramian.diagonal()
    inverse = 1 / xp.where(squares > 0, squares, 1.0)
    # Row i holds the coordinates of the projected gradient of objective i.
    coordinates = identity = _host.identity(gramian)
    for j in orders.T:
        inner = (coordinates * gramian[j]).sum(-1)
        removed = xp.where(inner < 0, inner, 0.0) * inverse[j]
        coordinates = coordinates - removed[:, None] * identity[j]
    return coordinates.sum(0)


def pcgrad(*, reduction: str = "sum") -> Aggregator:
    r"""Add the gradients after removing from each what conflicts with the others.

    Each gradient $x = g_i$ visits the others in a random order and, where $x^\top g_j < 0$, takes
    the step
    $$x \leftarrow x - \frac{x^\top g_j}{\lVert g_j \rVert^2} g_j.$$

    Two objectives never conflict with the result, which is then twice that of UPGrad; three or
    more may. The result is linear in the scale of each gradient. The state holds the key. Takes
    `m - 1` steps on an `(m, m)` matrix.

    Args:
        reduction: `"sum"` of the projected gradients, as in the paper, or their `"mean"`.

    Returns:
        The Aggregator; `init` needs a key.

    Raises:
        ValueError: If `reduction` is unknown, or `init` is given no key.

    Differs from other implementations:
        LibMTL visits the own gradient as well, which may undo the correction of another one.
        CAGrad's repository averages (`reduction="mean"`).
        The ConFIG package visits in the order of the rows, which favours the last.

    References:
        T. Yu, S. Kumar, A. Gupta, S. Levine, K. Hausman, C. Finn, Gradient Surgery for Multi-Task
        Learning, NeurIPS 2020, https://arxiv.org/abs/2001.06782

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> aggregator = jd.pcgrad()
        >>> aggregator(jac, aggregator.init(jac, key=jd.random.key(0)))[0]
        tensor([0.5848, 3.8012, 3.8012])
    """
    _check.choice("reduction", reduction, ("sum", "mean"))
    return weighted(Weighting("pcgrad", _init, partial(_update, reduction=reduction)))
