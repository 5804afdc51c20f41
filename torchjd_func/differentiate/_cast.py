"""Mixed precision: half-precision arithmetic between float32 parameters and float32 losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._accumulate import Accumulated
from torchjd_func.differentiate._objectives import InstanceWise, MultiTask
from torchjd_func.differentiate._scaled import Scaled
from torchjd_func.differentiate._shards import Sharded

PyTree = Any


def cast_floating(fn: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """Run a function in another floating-point precision.

    Floating arguments, parameters included, are cast to `dtype` on the way in, and floating results
    to float32 on the way out, so that Jacobians, gradients and losses are float32, and a rule sees
    no rounding but that of the objective. Complex, integer and other values pass as they are. What
    is closed over is not cast: pass buffers as an argument. `torch.bfloat16` needs nothing else;
    for `torch.float16` see `jd.loss_scale`. Unlike `torch.autocast` there is no list of operations
    that are kept in float32, and nothing that fails under `torch.func.vmap`.

    Args:
        fn: A function of pytrees, such as an objective. One of `jd.instancewise`, `jd.multitask`
            or `jd.accumulate` keeps its structure.
        dtype: A floating-point dtype, such as `torch.bfloat16`.

    Returns:
        The function, with the same arguments and results.

    Raises:
        ValueError: If `dtype` is not a floating-point dtype.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.cast_floating(lambda w, x: x @ w, torch.bfloat16)
        >>> jd.jac(objective)(torch.ones(2), torch.tensor([[1.0, 1.001]]))
        tensor([[1., 1.]])
    """
    _check.floating_dtype("dtype", dtype)
    _check.plain("cast_floating", fn, (Scaled, Sharded), "Cast first, and wrap what is cast.")
    if isinstance(fn, MultiTask):
        heads = {name: cast_floating(head, dtype) for name, head in fn.heads.items()}
        return MultiTask(cast_floating(fn.trunk, dtype), heads, fn.has_aux, fn.scale_heads)
    if isinstance(fn, Accumulated):
        inner = cast_floating(fn.fn, dtype)
        return Accumulated(inner, fn.n, fn.in_dims, fn.has_aux, fn.chunk_size)
    if isinstance(fn, InstanceWise):
        return fn.wrap(lambda inner: cast_floating(inner, dtype))
    return partial(_call, fn, dtype)


def _call(fn: Callable[..., Any], dtype: torch.dtype, /, *args: Any) -> Any:
    """Cast in, run, cast out."""
    out = fn(*_tree.map(partial(_cast, dtype=dtype), args))
    return _tree.map(partial(_cast, dtype=torch.float32), out)


def _cast(leaf: Any, *, dtype: torch.dtype) -> Any:
    """Cast a floating tensor."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
