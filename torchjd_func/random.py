"""Counter-based random numbers: a key is a value, a draw is a pure function of its key.

Threefry-2x32 with 20 rounds, in 64-bit integer arithmetic, so that the same key gives the same bits
eager, under `torch.func.vmap` and compiled, on every device. Use a key once: `split` it first.

References:
    J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, Parallel Random Numbers: As Easy as 1, 2, 3,
    SC 2011, https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchjd_func import _check

_MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# High counter words: draws, splits and folds of one key never meet.
_DRAW, _SPLIT, _FOLD = 0, 1, 2


def key(seed: int | Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """Make a key from a seed.

    Args:
        seed: An int, or a 0-d integer tensor (to be vmapped, say); 64 bits of it count.
        device: Where the key, and what is drawn from it, lives.

    Returns:
        `(2,)` int64, two 32-bit words.

    Example:
        >>> import torchjd_func as jd
        >>> jd.random.key(7)
        tensor([0, 7])
    """
    if isinstance(seed, int):
        words = [(seed >> 32) & _MASK, seed & _MASK]
        return torch.tensor(words, dtype=torch.int64, device=device)
    wide = seed.to(torch.int64) if device is None else seed.to(device, torch.int64)
    return torch.stack([(wide >> 32) & _MASK, wide & _MASK])


def split(key: Tensor, num: int = 2) -> Tensor:
    """Make `num` independent keys from one.

    Args:
        key: `(2,)`.
        num: How many.

    Returns:
        `(num, 2)`; iterate over it, or unpack it.

    Example:
        >>> import torchjd_func as jd
        >>> first, second = jd.random.split(jd.random.key(0))
    """
    _check.key(key)
    counter = torch.arange(num, dtype=torch.int64, device=key.device)
    return torch.stack(_threefry(key, torch.full_like(counter, _SPLIT), counter), dim=-1)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Make a key from a key and a number, such as a step or a rank.

    Args:
        key: `(2,)`.
        data: An int or a 0-d integer tensor; 32 bits of it count.

    Returns:
        `(2,)`.

    Example:
        >>> import torchjd_func as jd
        >>> step_key = jd.random.fold_in(jd.random.key(0), 12)
    """
    _check.key(key)
    low = torch.as_tensor(data, dtype=torch.int64, device=key.device) & _MASK
    return torch.stack(_threefry(key, torch.full_like(low, _FOLD), low), dim=-1)


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw 32 random bits for each element.

    Args:
        key: `(2,)`.
        shape: Shape of the result.

    Returns:
        int64 of `shape`, uniform on `[0, 2**32)`.

    Example:
        >>> import torchjd_func as jd
        >>> int(jd.random.bits(jd.random.key(0)))
        1797259609
    """
    _check.key(key)
    n = math.prod(shape)
    counter = torch.arange((n + 1) // 2, dtype=torch.int64, device=key.device)
    words = _threefry(key, torch.full_like(counter, _DRAW), counter)
    return torch.cat(words)[:n].reshape(tuple(shape))


def uniform(
    key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw from the uniform distribution on `[0, 1)`.

    Args:
        key: `(2,)`.
        shape: Shape of the result.
        dtype: float64 has 53 random bits, others are rounded from 24.

    Returns:
        Tensor of `shape` and `dtype`.

    Example:
        >>> import torchjd_func as jd
        >>> round(float(jd.random.uniform(jd.random.key(0))), 4)
        0.4185
    """
    if dtype == torch.float64:
        return _wide_bits(key, shape, 53).to(dtype) * 2.0**-53
    return ((bits(key, shape) >> 8).to(torch.float32) * 2.0**-24).to(dtype)


def normal(key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the standard normal distribution, by inversion in float64.

    Args:
        key: `(2,)`.
        shape: Shape of the result.
        dtype: Of the result. The bits behind a draw are the same everywhere; its last digit may
            differ between libraries of elementary functions.

    Returns:
        Tensor of `shape` and `dtype`.

    Example:
        >>> import torchjd_func as jd
        >>> tuple(jd.random.normal(jd.random.key(0), (3, 2)).shape)
        (3, 2)
    """
    centred = (_wide_bits(key, shape, 52).to(torch.float64) + 0.5) * 2.0**-51 - 1.0
    return (math.sqrt(2.0) * torch.erfinv(centred)).to(dtype)


def permutation(key: Tensor, n: int) -> Tensor:
    """Draw a uniformly random order of `0 ... n-1`.

    Args:
        key: `(2,)`.
        n: Length.

    Returns:
        `(n,)` int64.

    Example:
        >>> import torchjd_func as jd
        >>> sorted(jd.random.permutation(jd.random.key(0), 4).tolist())
        [0, 1, 2, 3]
    """
    return torch.argsort(_wide_bits(key, (n,), 62), stable=True)


def _wide_bits(key: Tensor, shape: Sequence[int], n_bits: int) -> Tensor:
    """Draw `n_bits` (32 ... 62) random bits for each element."""
    pair = bits(key, (2, *shape))
    return ((pair[0] << 32) | pair[1]) >> (64 - n_bits) & ((1 << n_bits) - 1)


def _threefry(key: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt the counters `(high, low)` with `key`: 20 rounds, a key injection every 4."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = (high + schedule[0]) & _MASK, (low + schedule[1]) & _MASK
    for injection in range(1, 6):
        for rotation in _ROTATIONS[(injection - 1) % 2]:
            x = (x + y) & _MASK
            y = (((y << rotation) | (y >> (32 - rotation))) & _MASK) ^ x
        x = (x + schedule[injection % 3]) & _MASK
        y = (y + schedule[(injection + 1) % 3] + injection) & _MASK
    return x, y
