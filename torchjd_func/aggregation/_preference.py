"""The preference vector of methods that take one."""

from __future__ import annotations

from torch import Tensor

from torchjd_func import _check


def resolve(preference: Tensor | None, gramian: Tensor) -> Tensor:
    """Return the preference `(m,)` in the dtype and on the device of `gramian`; default `1/m`."""
    m = gramian.shape[0]
    if preference is None:
        return gramian.new_full((m,), 1 / max(m, 1))
    _check.length("preference", preference, m)
    return preference.to(gramian)
