"""The preference vector of methods that take one."""

from __future__ import annotations

from torch import Tensor

from torchjd_func import _names, _present
from torchjd_func._names import Vector


def resolve(preference: Vector | None, like: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the preference `(m,)`, 0 where absent; by default one over the number of rows."""
    if preference is None:
        return _present.uniform(present, like)
    return _present.only(present, _names.entries("preference", preference, like))
