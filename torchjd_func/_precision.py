"""Products that keep their digits: wide sums, whatever autocast says."""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Numbers in a block that is cast: what fits in the cache of a CPU, or is half a GB on a device.
CAST, CAST_ON_DEVICE = 2**17, 2**26
MOST_BLOCKS = 16  # in compiled code


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype in which sums over numbers of `dtype` are kept: float32 or better."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def in_one_precision(*groups: Sequence[Tensor]) -> Sequence[Any]:
    """Bring floating tensors to the widest of their precisions, as where autocast mixed them."""
    dtypes = {x.dtype for group in groups for x in group if x.is_floating_point()}
    if len(dtypes) < 2:
        return groups
    wide = functools.reduce(torch.promote_types, dtypes)
    return [[x.to(wide) if x.is_floating_point() else x for x in group] for group in groups]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a b^T` of real matrices `(..., m, n)`, in float64.

    A Gramian holds squares: in the dtype of the rows half of their digits would be lost.
    """
    parts = zip(_parts(a), _parts(b), strict=True)
    terms = [(x, x if a is b else y) for x, y in parts]
    return functools.reduce(torch.add, [_wide_product(*pair) for pair in terms])


def squares(a: Tensor) -> Tensor:
    """Return the squared norms of the rows of real matrices, `(..., m)`, in float64."""
    return functools.reduce(torch.add, [x.double().square().sum(-1) for x in _parts(a)])


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a b^T` in float64; each is cast once."""
    wide = a.double()
    return wide @ (wide if a is b else b.double()).mT


def _parts(matrices: Tensor) -> tuple[Tensor, ...]:
    """Cut the columns into blocks to be cast to float64."""
    if matrices.dtype == torch.float64:
        return (matrices,)
    rows, n = math.prod(matrices.shape[:-1]), matrices.shape[-1]
    width = max(1, (CAST_ON_DEVICE if matrices.is_cuda else CAST) // max(1, rows))
    if torch.compiler.is_compiling():  # each block is code
        width = max(width, -(-n // MOST_BLOCKS))
    return matrices.split(width, dim=-1) if n > width else (matrices,)


def sums(weights: Tensor, matrices: Tensor) -> Tensor:
    """Return `weights @ matrices`, `(..., k, n)`, in float64 if the weights are."""
    dtype = torch.promote_types(accumulation_dtype(matrices.dtype), weights.dtype)
    narrow = dtype != torch.float64
    parts = (matrices,) if narrow else _parts(matrices)
    with full_precision():
        columns = [weights.to(dtype) @ part.to(dtype) for part in parts]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def full_precision() -> AbstractContextManager[None]:
    """Keep autocast off pullbacks, products and rules."""
    on = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return _off() if on else nullcontext()


@contextmanager
def _off() -> Generator[None]:
    """Switch autocast off."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
