"""Normalisation whose input and weights are of different precision, as under torch.autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchjd_func.differentiate._layerwise import spelled


class NormsInOnePrecision(TorchFunctionMode):
    """Computes a normalisation in the widest precision of its arguments.

    So do torch's kernels, but their backward passes take no mixture under vmap (torch 2.13, CPU).
    """

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
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # cannot be traced in a mode (torch 2.13)
            func = torch.unflatten
        if func in _NORMS:
            return _in_one_precision(func, args, kwargs)
        return spelled(func, False)(*args, **kwargs)  # what torch mistakes on every route


_NORMS = (F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm)


def _in_one_precision(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Normalise in the widest precision."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    dtypes = [x.dtype for x in given]
    on_gpu = given[0].is_cuda and func in (F.layer_norm, F.group_norm)  # autocast sees to these
    if on_gpu or all(dtype == dtypes[0] for dtype in dtypes):
        return func(*args, **kwargs)
    wide = functools.reduce(torch.promote_types, dtypes)
    args = tuple(_cast(x, wide) for x in args)
    out = func(*args, **{name: _cast(x, wide) for name, x in kwargs.items()})
    return out.to(dtypes[0])


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """Return a tensor in a precision, itself if it has it, and anything else as it is."""
    return x.to(dtype) if isinstance(x, Tensor) else x
