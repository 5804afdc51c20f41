"""Under torch.autocast the objective runs as it says, and all else in full precision."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from torchjd_func.differentiate._layerwise import Spelled

Autocast = tuple[tuple[str, torch.dtype], ...]  # kinds of device, and the precision on them


def around() -> Autocast:
    """Return what autocast is in force where a transformed function is called."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def as_called(autocast: Autocast, *, watched: bool = False) -> AbstractContextManager[object]:
    """Run an objective as where the call was; one that is watched is spelled out already."""
    mode = nullcontext() if watched else Spelled()
    return _on(autocast, mode) if autocast else mode


@contextmanager
def _on(autocast: Autocast, mode: AbstractContextManager[object]) -> Generator[None]:
    """Switch autocast on again."""
    kinds = dict(autocast)
    with _of("cpu", kinds), _of("cuda", kinds), mode:
        yield


def _of(kind: str, kinds: dict[str, torch.dtype]) -> AbstractContextManager[object]:
    """Return the autocast of one kind of device."""
    return torch.autocast(kind, dtype=kinds[kind]) if kind in kinds else nullcontext()
