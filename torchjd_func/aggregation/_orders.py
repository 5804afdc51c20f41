"""Random orders in which each row visits the others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host, _threefry
from torchjd_func._host import Array


def shuffled_others(key: Tensor, m: int) -> Array:
    """Draw for each row a uniformly random order of the other rows.

    Args:
        key: `(2,)`.
        m: Number of rows.

    Returns:
        `(m, m - 1)` int64, an array if the key is plain; row `i` holds every index but `i`.
    """
    if m == 2 and _host.numbers(key) is not None:
        return np.array([[1], [0]])
    draws = _threefry.wide_bits(key, (m, max(m - 1, 0)), 53)
    order = _host.argsort(draws)
    plain = isinstance(order, np.ndarray)
    row = np.arange(m) if plain else torch.arange(m, device=key.device)
    return order + (order >= row[:, None])
