"""Matrices of known stationarity, rank and scale."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

import torchjd_func as jd

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

KINDS = ("gaussian", "scaled", "tiny", "duplicate", "opposite", "zero", "integer", "low_rank")
SIZES = ((1, 3), (2, 2), (2, 5), (3, 2), (3, 7), (4, 3), (5, 20))


def matrix(kind: str, m: int, n: int, seed: int = 0) -> Tensor:
    """Return an `(m, n)` float64 matrix of a kind."""
    first, second = jd.random.split(jd.random.key(seed))
    base = jd.random.normal(first, (m, n), dtype=torch.float64)
    if kind == "scaled":  # rows of norms 1e-6 ... 1e6
        exponents = 12 * jd.random.uniform(second, (m, 1), dtype=torch.float64) - 6
        return base * 10**exponents
    if kind == "integer":  # ties, exact conflicts, repeated rows
        return base.mul(1.5).round()
    if kind == "low_rank":
        mix = jd.random.normal(second, (m, (m + 1) // 2), dtype=torch.float64)
        return mix @ base[: (m + 1) // 2]
    if kind == "tiny":  # one row far smaller than the others
        return torch.cat([base[:1] * 1e-6, base[1:]])
    partner = {"duplicate": 2.0 * base[:1], "opposite": -3.0 * base[:1], "zero": 0.0 * base[:1]}
    return torch.cat([base[:-1], partner[kind]]) if kind in partner and m > 1 else base


def all_matrices() -> list[tuple[str, Tensor]]:
    """Return every kind at every size, with names for test ids."""
    return [(f"{kind}-{m}x{n}", matrix(kind, m, n)) for kind in KINDS for m, n in SIZES]


@st.composite
def jacobians(
    draw, min_m: int = 1, max_m: int = 6, min_n: int = 1, kinds: tuple[str, ...] = KINDS
) -> Tensor:
    """Draw a matrix of any kind and size."""
    m = draw(st.integers(min_m, max_m))
    n = draw(st.integers(min_n, 8))
    return matrix(draw(st.sampled_from(kinds)), m, n, draw(st.integers(0, 10**6)))


def conflict(jac: Tensor, direction: Tensor) -> Tensor:
    """Return the lowest cosine between the direction and a row; 0 where either is only rounding."""
    norms, length = jac.norm(dim=-1), direction.norm()
    rounding = length <= 1e-7 * norms.max()  # rows cancel to a stationary point
    cosine = (jac @ direction) / (norms * length).clamp(min=torch.finfo(jac.dtype).tiny)
    return torch.where(rounding | (norms == 0), 0.0, cosine).min()
