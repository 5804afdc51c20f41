"""Matrices of known stationarity, rank and scale."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import random

KINDS = ("gaussian", "scaled", "tiny", "duplicate", "opposite", "zero", "integer", "low_rank")


def matrix(kind: str, m: int, n: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return an `(m, n)` float64 matrix of one of `KINDS`; the same numbers on every device."""
    return _matrix(kind, m, n, seed).to(device)


def _matrix(kind: str, m: int, n: int, seed: int) -> Tensor:
    first, second = random.split(random.key(seed))
    base = random.normal(first, (m, n), dtype=torch.float64)
    if kind == "scaled":  # rows of norms 1e-6 ... 1e6
        exponents = 12 * random.uniform(second, (m, 1), dtype=torch.float64) - 6
        return base * 10**exponents
    if kind == "integer":  # ties, exact conflicts, repeated rows
        return base.mul(1.5).round()
    if kind == "low_rank":
        mix = random.normal(second, (m, (m + 1) // 2), dtype=torch.float64)
        return mix @ base[: (m + 1) // 2]
    if kind == "tiny":  # one row far smaller than the others
        return torch.cat([base[:1] * 1e-6, base[1:]])
    partner = {"duplicate": 2.0 * base[:1], "opposite": -3.0 * base[:1], "zero": 0.0 * base[:1]}
    return torch.cat([base[:-1], partner[kind]]) if kind in partner and m > 1 else base


def as_tree(values: Tensor) -> dict:
    """Cut a matrix by columns into a nested pytree, in leaf order, not insertion order."""
    m, n = values.shape
    half = n // 2
    return {"z": [values[:, half:]], "a": (values[:, :half].reshape(m, half, 1), None)}


def as_matrix(tree: dict) -> Tensor:
    """Undo `as_tree`, for a tree with or without the leading dimension."""
    first, second = tree["a"][0], tree["z"][0]
    return torch.cat([first.reshape(*second.shape[:-1], -1), second], dim=-1)


def conflict(jac: Tensor, direction: Tensor) -> Tensor:
    """Return the lowest cosine between the direction and a row; 0 where either is only rounding."""
    norms, length = jac.norm(dim=-1), direction.norm()
    rounding = length <= 1e-7 * norms.max()  # rows cancel to a stationary point
    cosine = (jac @ direction) / (norms * length).clamp(min=torch.finfo(jac.dtype).tiny)
    return torch.where(rounding | (norms == 0), 0.0, cosine).min()


def span_gap(jac: Tensor, direction: Tensor) -> float:
    """Return the relative distance of a direction from the span of the rows."""
    norms = jac.norm(dim=-1, keepdim=True)
    rows = jac / torch.where(norms > 0, norms, 1.0)
    coordinates = torch.linalg.pinv(rows.mT, rtol=1e-10) @ direction
    return float((rows.mT @ coordinates - direction).norm() / direction.norm().clamp(min=1e-300))
