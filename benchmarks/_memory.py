"""How much memory a function needs at its worst, besides what it is given."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class Storages(TorchDispatchMode):
    """Follows the bytes of tensors that are alive; `peak` is the most there were."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.peak = 0
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and note the storages that it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.live())
        return out

    def live(self) -> int:
        """Return the bytes of now; storages that FSDP frees are still there, with no bytes."""
        storages = [ref() for ref in list(self.alive.values())]
        return sum([storage.nbytes() for storage in storages if storage is not None])

    def _note(self, storage: Any) -> None:
        """Count a storage from now until it is freed."""
        address = storage._cdata
        if address not in self.known and address not in self.alive:
            self.alive[address] = weakref.ref(storage)
            weakref.finalize(storage, self.alive.pop, address, None)


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
