"""How much memory a function needs at its worst, besides what it is given."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """Follows the bytes of tensors that are alive; `peak` is the most there were."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and note the storages that it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        """Count a storage from now until it is freed."""
        address, size = storage._cdata, storage.nbytes()
        if address in self.seen:
            return
        self.seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        """Stop counting a storage."""
        self.seen.discard(address)
        self.live -= size


def peak(fn: Callable[..., Any], *given: Tensor) -> int:
    """Return the peak of bytes in tensors, plus that of bytes in Python and numpy, of one call."""
    with Storages([*given]):  # what is imported or remembered at a first call does not count
        fn(*given)
    tracemalloc.start()
    with Storages([*given]) as storages:
        fn(*given)
    _, other = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return storages.peak + other
