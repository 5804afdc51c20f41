"""Matrices of known stationarity, rank and scale."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from torchjd_func.testing._matrices import KINDS, conflict, matrix

__all__ = ["KINDS", "all_matrices", "balanced", "conflict", "jacobians", "matrix"]

A = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [-1.0, -1.0, 3.0]], dtype=torch.float64)
C = torch.tensor([[1.0, 2.0], [-2.0, -1.5], [0.5, -3.0]], dtype=torch.float64)  # stationary
A2 = torch.tensor([[-3.0, 1.0, 2.0], [5.0, 0.0, 1.0]], dtype=torch.float64)
E = torch.tensor([[0.0, 1.0, 0.0], [1.0, 3.0, 0.0], [-1.0, 0.0, -1.0]], dtype=torch.float64)
S = torch.tensor([[1e-3, 0.0], [-1.0, 1.0]], dtype=torch.float64)
K = torch.tensor(
    [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [75.0, -666.0, 23.0], [1.0, 2.0, 3.0], [2.0, 0.0, 1.0]],
    dtype=torch.float64,
)

SIZES = ((1, 3), (2, 2), (2, 5), (3, 2), (3, 7), (4, 3), (5, 20))


def all_matrices() -> list[tuple[str, Tensor]]:
    """Return every kind at every size, with names for test ids."""
    return [(f"{kind}-{m}x{n}", matrix(kind, m, n)) for kind in KINDS for m, n in SIZES]


def balanced(m: int, n: int, noise: float, seed: int) -> Tensor:
    """Return rows of which a positive combination is nearly zero."""
    rows = matrix("gaussian", m, n, seed)
    return torch.cat([-rows[1:].mean(0, keepdim=True) + noise * rows[:1], rows[1:]])


@st.composite
def jacobians(
    draw, min_m: int = 1, max_m: int = 6, min_n: int = 1, kinds: tuple[str, ...] = KINDS
) -> Tensor:
    """Draw a matrix of any kind and size."""
    m = draw(st.integers(min_m, max_m))
    n = draw(st.integers(min_n, 8))
    return matrix(draw(st.sampled_from(kinds)), m, n, draw(st.integers(0, 10**6)))
