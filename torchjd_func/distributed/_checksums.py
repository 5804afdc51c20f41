"""What is compared of floats that are to be the same on all processes, but for rounding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func._shares import Numbers


def checksums(leaves: dict[str, Any]) -> dict[str, float]:
    """Return a number of each leaf of floats: its direction, along one, and its logarithmic size.

    What is a thousandth of the largest leaf, such as the rounding of a zero, counts for less.
    """
    floats = {
        path: leaf.of.detach()
        for path, leaf in leaves.items()
        if isinstance(leaf, Numbers) and not leaf.of.is_meta and is_inexact(leaf.of)
    }
    if not floats:
        return {}
    pairs = [_along_and_norm(x) for x in floats.values()]
    known = torch.stack([pair.to(pairs[0].device) for pair in pairs]).tolist()
    floor = 1e-3 * max(norm for _, norm in known)
    return {
        path: along / (norm + floor) + math.log2(norm + floor) if floor else 0.0
        for path, (along, norm) in zip(floats, known, strict=True)
    }


def _along_and_norm(leaf: Tensor) -> Tensor:
    """Return `(2,)`: the product with a direction that is periodic, and the norm."""
    x = _tree.real(leaf).reshape(-1)
    x = torch.where(x.isfinite(), x, 0)
    direction = torch.arange(1, 1025, device=x.device, dtype=torch.float64).cos()
    whole = len(x) - len(x) % 1024
    sums = x[:whole].reshape(-1, 1024).sum(0, dtype=torch.float64)
    rest = x[whole:].to(torch.float64) @ direction[: len(x) - whole]
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return torch.stack([sums @ direction + rest, norm])


def is_inexact(x: Tensor) -> bool:
    """Say whether a tensor holds numbers that rounding changes."""
    return x.is_floating_point() or x.is_complex()
