"""Under torch.autocast the objective runs as it says, and all else in full precision."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from torchjd_func.differentiate._norms import NormsInOnePrecision

Autocast = tuple[tuple[str, torch.dtype], ...]  # kinds of device, and the precision on them


def around() -> Autocast:
    """Return what autocast is in force where a transformed function is called."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def as_called(autocast: Autocast) -> AbstractContextManager[object]:
    """Run an objective as where the transformed function was called."""
    return _on(autocast) if autocast else _norms()


@contextmanager
def _on(autocast: Autocast) -> Generator[None]:
    """Switch autocast on again."""
    kinds = dict(autocast)
    with _of("cpu", kinds), _of("cuda", kinds), _norms():
        yield


def _norms() -> AbstractContextManager[object]:
    """Let norms take a mixture of precisions, as compiled ones do by Inductor (torch 2.13)."""
    return nullcontext() if torch.compiler.is_compiling() else NormsInOnePrecision()


def _of(kind: str, kinds: dict[str, torch.dtype]) -> AbstractContextManager[object]:
    """Return the autocast of one kind of device."""
    return torch.autocast(kind, dtype=kinds[kind]) if kind in kinds else nullcontext()
