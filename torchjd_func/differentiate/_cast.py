"""Mixed precision: half-precision arithmetic between float32 parameters and float32 losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._layerwise import Spelled
from torchjd_func.differentiate._objective import Function, as_objective

PyTree = Any


def running_statistics(path: str) -> bool:
    """Say whether a leaf is a running statistic of a normalisation, which moves in small steps."""
    return path.rpartition(".")[2].startswith("running_")


def cast_floating(
    fn: Callable[..., Any],
    dtype: torch.dtype,
    *,
    keep: Callable[[str], bool] = running_statistics,
) -> Callable[..., Any]:
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
        keep: Predicate of the path of a leaf in its argument, such as `"1.running_mean"`: what is
            not cast. By default running statistics, whose small steps would be rounded away;
            BatchNorm then computes in their precision, and returns `dtype`.

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
    return as_objective(fn).wrap(lambda fn: partial(_call, fn, dtype, keep))


def _call(
    fn: Function, dtype: torch.dtype, keep: Callable[[str], bool], /, *args: Any, **kwargs: Any
) -> Any:
    """Cast in, run, cast out; what comes back as it went in has its own dtype again."""
    known: dict[Tensor, Tensor] = {}

    def cast_argument(value: PyTree) -> PyTree:
        flat, rebuild = _tree.flatten(value)
        pairs = zip(_tree.paths(value), flat, strict=True)
        return rebuild([leaf if keep(path) else _cast(leaf, dtype, known) for path, leaf in pairs])

    given = [cast_argument(arg) for arg in args]
    named = {name: cast_argument(arg) for name, arg in kwargs.items()}
    with Spelled():
        out = fn(*given, **named)
    return _tree.map(partial(_cast_back, dtype=dtype, known=known), out)


def _cast(leaf: Any, dtype: torch.dtype, known: dict[Tensor, Tensor]) -> Any:
    """Cast a floating tensor, and remember it."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    half = leaf.to(dtype)
    known[half] = leaf
    return half


def _cast_back(leaf: Any, *, dtype: torch.dtype, known: dict[Tensor, Tensor]) -> Any:
    """Return what a tensor was cast from, or what was computed, in float32."""
    if not isinstance(leaf, Tensor):
        return leaf
    return known[leaf] if leaf in known else leaf.float() if leaf.dtype == dtype else leaf
