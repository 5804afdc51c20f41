"""Parameters and buffers without numbers, in an objective of tensors that have some."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchjd_func import _check, _tree


class _Numbered(TorchFunctionMode):
    """Raises where what has numbers comes of what has none.

    Products of torch with a tensor on `"meta"` take memory that nobody wrote (torch 2.13).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        if isinstance(out, Tensor) and not out.is_meta:
            tensors = _tree.tensors([x for x in (*args, *given.values()) if _may_hold(x)])
            tensors = [x for x in tensors if not x.is_nested]  # which use such themselves
            if any(x.is_meta for x in tensors) and not all(x.is_meta for x in tensors):
                _check.numbered(func, tensors)
        return out


def _may_hold(x: Any) -> bool:
    """Say whether an argument of an operation is a tensor, or several."""
    return isinstance(x, Tensor | list | tuple)


def numbered() -> contextlib.AbstractContextManager[Any]:
    """Return a context that refuses tensors without numbers; graphs refuse them by themselves."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _Numbered()
