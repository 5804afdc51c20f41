"""The preference vector of methods that take one."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _names, _present
from torchjd_func._names import Vector


def resolve(preference: Vector | None, like: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the preference `(m,)`, 0 where absent; by default one over the number of rows."""
    if preference is None:
        return _present.uniform(present, like)
    return _present.only(present, _names.entries("preference", preference, like))


def shares_of(preference: Vector | None, like: Tensor, present: Tensor | None) -> Tensor:
    """Return the shares of a bargain `(m,)`, 1 where absent; by default 1 for each row."""
    if preference is None:
        return torch.ones_like(like[0])
    return _present.only(present, _names.entries("preference", preference, like), 1.0)
