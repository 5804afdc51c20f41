"""What methods share that keep a quantity for every entry of the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _host, _tree
from torchjd_func._types import PyTree

# Numbers in a block of columns: what fits in the cache of a CPU, or is half a GB on a device.
BLOCK, BLOCK_ON_DEVICE = 2**18, 2**26


def zeros_like(jac: PyTree) -> PyTree:
    """Return zeros in the structure of `jac`, real, in float32 or better."""
    return _tree.map(_zeros, jac)


def check(method: str, field: str, tree: PyTree, jac: PyTree) -> None:
    """Check that a pytree of the state belongs to Jacobians like `jac`."""
    _check.state_structure(method, field, _tree.same_structure(tree, jac))
    pairs = zip(_tree.leaves(tree), _tree.leaves(jac), strict=True)
    for path, (value, leaf) in zip(_tree.paths(jac), pairs, strict=True):
        name = f"{field}[{path!r}]" if path else field
        _check.state(method, name, value, _tree.real_shape(leaf))


def norms(jac: PyTree) -> Tensor:
    """Return the norm of each row, `(m,)` in float64."""
    return safe_sqrt(_tree.squared_norms(jac))


def by_columns(fn: Callable[..., Tensor], rows: Tensor, *vectors: Tensor) -> Tensor:
    """Apply a function of columns to blocks that fit the cache, so that memory is read once.

    Args:
        fn: Of `rows` `(m, n)` and any `vectors` `(n,)`, returns `(n,)`.
        rows: `(m, n)`.
        *vectors: `(n,)`.

    Returns:
        `(n,)`.
    """
    parts = [fn(*block) for block in blocks(rows, *vectors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def blocks(rows: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut the columns of `rows` `(m, n)`, and of `others` `(..., n)`, into what fits the cache."""
    width = max(1, (BLOCK_ON_DEVICE if rows.is_cuda else BLOCK) // max(1, rows.shape[0]))
    # Compiled code is one loop as it is.
    if torch.compiler.is_compiling() or rows.shape[1] <= width:
        return [(rows, *others)]
    return list(zip(*(x.split(width, dim=-1) for x in (rows, *others)), strict=True))


def safe_sqrt(squares: Tensor) -> Tensor:
    """Return the square root, with a derivative of 0 where the square is not positive."""
    if squares.is_cuda and _host.unwatched(squares):  # two launches instead of six
        return squares.clamp(min=0).sqrt()
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def slope_of_log(values: Tensor) -> Tensor:
    """Return `1 / values`, not-a-number where there is no logarithm."""
    return torch.where((values > 0) & (values < torch.inf), 1 / values, torch.nan)


def interpolate(tracked: PyTree, jac: PyTree, share: Tensor, scale: Tensor | None) -> PyTree:
    """Return `tracked + share (scale_i g_i - tracked)`, with `scale` `(m,)` or 1."""
    return _tree.map(partial(_interpolate, share=share, scale=scale), tracked, jac)


def combine(tracked: PyTree, weights: Tensor, jac: PyTree) -> PyTree:
    """Return the weighted sum of the `tracked` rows in the shapes and dtypes of rows of `jac`."""
    return _tree.map(_tree.row_like, _tree.weighted_sum(tracked, weights), jac)


def _zeros(leaf: Tensor) -> Tensor:
    """Return zeros for one leaf."""
    return leaf.new_zeros(_tree.real_shape(leaf), dtype=_tree.accumulation_dtype(leaf.dtype))


def _interpolate(tracked: Tensor, leaf: Tensor, *, share: Tensor, scale: Tensor | None) -> Tensor:
    """Move one leaf of `tracked` towards one of the Jacobian."""
    rows = _tree.real(leaf)
    if scale is not None:
        rows = rows * scale.to(rows.dtype).reshape(-1, *(1,) * (rows.ndim - 1))
    return tracked + share.to(tracked.dtype) * (rows - tracked)
