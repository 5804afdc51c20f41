"""Objectives whose backward pass runs at another scale, for float16 not to underflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._accumulate import Accumulated
from torchjd_func.differentiate._objectives import InstanceWise, MultiTask


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Scaled:
    """An objective with the losses and gradients of `fn`, from losses `scale` times as large."""

    fn: Callable[..., Any]
    scale: Tensor

    def __call__(self, *args: Any) -> Any:
        """Return the losses as they are."""
        return self.fn(*args)

    def __repr__(self) -> str:
        """Return the inner objective in one line."""
        return f"Scaled({getattr(self.fn, '__name__', repr(self.fn))})"


def multiplied(fn: Callable[..., Any], scale: Tensor, has_aux: bool) -> Callable[..., Any]:
    """Return an objective of the same structure, with larger losses."""
    if isinstance(fn, MultiTask):
        heads = {name: multiplied(head, scale, False) for name, head in fn.heads.items()}
        return MultiTask(fn.trunk, heads, fn.has_aux, fn.scale_heads)
    if isinstance(fn, Accumulated):
        inner = multiplied(fn.fn, scale, has_aux)
        return Accumulated(inner, fn.n, fn.in_dims, fn.has_aux, fn.chunk_size)
    if isinstance(fn, InstanceWise):
        return fn.wrap(lambda inner: multiplied(inner, scale, has_aux))
    return partial(_call, fn, scale, has_aux)


def _call(fn: Callable[..., Any], scale: Tensor, has_aux: bool, /, *args: Any) -> Any:
    """Return larger losses (and aux)."""
    out = fn(*args)
    if not has_aux:
        return scale_by(scale, out)
    losses, aux = _check.aux_pair(out)
    return scale_by(scale, losses), aux


def scale_by(scale: Tensor, tree: Any) -> Any:
    """Multiply all leaves of a pytree, in their own dtypes."""
    return _tree.map(lambda leaf: scale.to(leaf.dtype) * leaf, tree)
