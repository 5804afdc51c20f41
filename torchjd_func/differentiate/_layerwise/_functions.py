"""Functions of torch by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


def named(names: str) -> frozenset[Callable[..., Any]]:
    """Return what goes by these names on `torch`, on its tensors and among layers."""
    homes = (torch, torch.Tensor, F, torch.special, torch.linalg)
    return frozenset(
        getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)
    )
