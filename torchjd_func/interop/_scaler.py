"""Gradients of scaled losses, as `torch.amp.GradScaler` looks at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.interop._heads import Grads

State = Any


def unscaled(leaves: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return rows, 0 if some of them overflowed, and what scales again, not a number then."""
    finite = _all_finite(leaves)
    rows = [torch.where(finite, leaf / scale, 0) for leaf in leaves]
    return rows, torch.where(finite, scale, torch.nan)


def kept_if_finite(grads: Grads, after: State, before: State) -> tuple[Grads, State]:
    """Keep the state, and spoil all gradients for the scaler to see, where some overflowed."""
    seen = [grad for _, grad in grads if grad is not None]
    if not seen:
        return grads, after
    finite = _all_finite(seen)
    spoilt = [(p, g if g is None else torch.where(finite, g, torch.nan)) for p, g in grads]
    return spoilt, _tree.map(lambda new, old: torch.where(finite, new, old), after, before)


def _all_finite(leaves: list[Tensor]) -> Tensor:
    """Return whether all numbers are finite, as a tensor, so that nothing waits for it."""
    return torch.stack([leaf.isfinite().all() for leaf in leaves]).all()
