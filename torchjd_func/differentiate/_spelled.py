"""A mode for objectives that no layer-by-layer route watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from torchjd_func.differentiate._layerwise import spelled


class Spelled(TorchFunctionMode):
    """Computes what torch mistakes, such as norms of mixed precisions, in other operations."""

    def __init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        return spelled(func, False)(*args, **(kwargs or {}))
