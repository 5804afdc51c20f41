"""Counter-based random numbers: a key is a value, a draw is a pure function of its key.

Threefry-2x32 with 20 rounds, in integer arithmetic, so that the same key gives the same bits
eager, under `torch.func.vmap` and compiled, on every device. Use a key once: `split` it first.

References:
    J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, Parallel Random Numbers: As Easy as 1, 2, 3,
    SC 2011, https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host, _threefry
from torchjd_func._host import Array

__all__ = ["bits", "fold_in", "key", "normal", "permutation", "required", "split", "uniform"]


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
    _check.whole("seed", seed)
    if isinstance(seed, int):
        words = [(seed >> 32) & _threefry.MASK, seed & _threefry.MASK]
        return torch.tensor(words, dtype=torch.int64, device=device)
    wide = seed.to(torch.int64) if device is None else seed.to(device, torch.int64)
    return torch.stack([(wide >> 32) & _threefry.MASK, wide & _threefry.MASK])


def required(key: Tensor | None, name: str) -> Tensor:
    """Return the key that `init` was given, for the `init_fn` of a random method of your own.

    Args:
        key: `(2,)`, or `None` where the user passed none.
        name: The method, for the message.

    Returns:
        The key.

    Raises:
        ValueError: If there is none; the message says how to pass one.

    Example:
        >>> import torchjd_func as jd
        >>> jd.random.required(jd.random.key(7), "mine")
        tensor([0, 7])
    """
    return _check.key_present(name, key)


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
    _check.integer("num", num, 0)
    words = _threefry.encrypt(key, _threefry.SPLIT, num).T
    return words.contiguous() if isinstance(words, Tensor) else torch.from_numpy(words.copy())


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
    _check.whole("data", data)
    low = torch.as_tensor(data, dtype=torch.int64, device=key.device) & _threefry.MASK
    words = _threefry.rounds(key.unbind(), torch.full_like(low, _threefry.FOLD), low)
    return torch.stack(words, dim=-1)


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
    _check.shape(shape)
    return _host.tensor(_threefry.bits(key, shape))


def uniform(
    key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw from the uniform distribution on `[0, 1)`.

    Args:
        key: `(2,)`.
        shape: Shape of the result.
        dtype: Its significand has as many random bits: 53 of float64, 24 of float32, 11 of float16.

    Returns:
        Tensor of `shape` and `dtype`.

    Example:
        >>> import torchjd_func as jd
        >>> round(float(jd.random.uniform(jd.random.key(0))), 4)
        0.4185
    """
    _check.key(key)
    _check.shape(shape)
    _check.floating_dtype("dtype", dtype)
    if dtype == torch.float64:
        return _host.tensor(_threefry.wide_bits(key, shape, 53)).to(dtype) * 2.0**-53
    digits = round(1 - math.log2(torch.finfo(dtype).eps))  # more would be rounded up to 1
    words = _threefry.bits(key, shape) >> (32 - digits)
    if not isinstance(words, Tensor):
        words = torch.from_numpy(np.asarray(words, dtype=np.float32))
    return (words.to(torch.float32) * 2.0**-digits).to(dtype)


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
    _check.key(key)
    _check.shape(shape)
    _check.floating_dtype("dtype", dtype)
    return inverted(_threefry.wide_bits(key, shape, 52)).to(dtype)


def inverted(words: Array) -> Tensor:
    """Return standard normal numbers, in float64, of words of 52 bits."""
    wide = words.to(torch.float64) if isinstance(words, Tensor) else words
    return math.sqrt(2.0) * torch.erfinv(_host.tensor((wide + 0.5) * 2.0**-51 - 1.0))


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
    _check.key(key)
    _check.integer("n", n, 0)
    return torch.argsort(_host.tensor(_threefry.wide_bits(key, (n,), 62)), stable=True)
