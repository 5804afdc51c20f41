"""Random orders in which each row visits the others."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import random


def shuffled_others(key: Tensor, m: int) -> Tensor:
    """Draw for each row a uniformly random order of the other rows.

    Args:
        key: `(2,)`.
        m: Number of rows.

    Returns:
        `(m, m - 1)` int64; row `i` holds every index but `i`.
    """
    draws = random.uniform(key, (m, max(m - 1, 0)), dtype=torch.float64)
    order = draws.argsort(dim=-1, stable=True)
    row = torch.arange(m, device=key.device).unsqueeze(-1)
    return order + (order >= row)


def one_hot(index: Tensor, m: int) -> Tensor:
    """Return rows of the identity `(..., m)` as a mask, for indices `(...)`."""
    return index.unsqueeze(-1) == torch.arange(m, device=index.device)
