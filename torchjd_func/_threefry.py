"""Threefry-2x32 with 20 rounds, in 64-bit integer arithmetic: random words from a key.

The same bits in torch and, where the key is plain, in numpy, which is many times faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _host
from torchjd_func._host import Array

MASK = 0xFFFFFFFF
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# High counter words: draws, splits and folds of one key never meet.
DRAW, SPLIT, FOLD = 0, 1, 2
# In numpy, up to so many counters are encrypted in one long integer, more in blocks.
FEW, BLOCK = 512, 16384


def bits(key: Tensor, shape: Sequence[int]) -> Array:
    """Draw 32 random bits for each element."""
    n = math.prod(shape)
    return encrypt(key, DRAW, (n + 1) // 2).reshape(-1)[:n].reshape(tuple(shape))


def wide_bits(key: Tensor, shape: Sequence[int], n_bits: int) -> Array:
    """Draw `n_bits` (32 ... 62) random bits for each element."""
    if _on_device(key):
        flat = _host.opaque(words, _launch, key, DRAW, math.prod(shape), n_bits)
        return flat.reshape((*key.shape[:-1], *shape))
    pair = bits(key, (2, *shape))
    return ((pair[0] << 32) | pair[1]) >> (64 - n_bits) & ((1 << n_bits) - 1)


def encrypt(key: Tensor, stream: int, n: int) -> Array:
    """Encrypt the counters `0 ... n-1` of a stream; returns `(2, n)` int64, an array if plain."""
    if _on_device(key):
        return _host.opaque(words, _launch, key, stream, n, 0)
    plain = _host.numbers(key)
    if plain is None or n == 0:
        counter = torch.arange(n, dtype=torch.int64, device=key.device)
        return torch.stack(rounds(key.unbind(), torch.full_like(counter, stream), counter))
    if n <= FEW:
        return _encrypt_few(plain.tolist(), stream, n)
    found = np.empty((2, n), dtype=np.int64)
    for start in range(0, n, BLOCK):
        counter = np.arange(start, min(start + BLOCK, n), dtype=np.uint32)
        found[:, start : start + BLOCK] = _rounds_in_place(plain.tolist(), stream, counter)
    return found


def _on_device(key: Tensor) -> bool:
    """Say whether a kernel encrypts: on CUDA, where the rounds are not compiled into one anyway."""
    return key.is_cuda and not torch.compiler.is_compiling()


def _launch(key: Tensor, stream: int, n: int, n_bits: int) -> Tensor:
    """Encrypt in a kernel."""
    from torchjd_func._kernels.threefry import encrypt_kernel  # needs Triton

    found = encrypt_kernel(key.reshape(-1, 2), stream, n, n_bits)
    return found.reshape((*key.shape[:-1], *found.shape[1:]))


@torch.library.custom_op("torchjd_func::threefry", mutates_args=())
def words(key: Tensor, stream: int, n: int, n_bits: int) -> Tensor:
    """Encrypt the counters `0 ... n-1` of a stream on a CUDA device.

    Args:
        key: `(..., 2)` int64.
        stream: The high counter word.
        n: How many.
        n_bits: Of a wide word; 0 for both words.

    Returns:
        `(..., 2, n)` int64, or `(..., n)` of wide words.
    """
    return _launch(key, stream, n, n_bits)


@words.register_fake
def _fake(key: Tensor, stream: int, n: int, n_bits: int) -> Tensor:
    """Tell the shape."""
    return key.new_empty((*key.shape[:-1], *(() if n_bits else (2,)), n))


@words.register_vmap
def _vmap(info: Any, in_dims: Any, key: Tensor, *options: Any) -> tuple[Tensor, int]:
    """Encrypt with all keys."""
    return words(key.movedim(in_dims[0], 0), *options), 0


def _encrypt_few(key: list[int], stream: int, n: int) -> Array:
    """Encrypt counters that lie side by side, 64 bits apart, in one long integer."""
    ones = ((1 << 64 * n) - 1) // ((1 << 64) - 1)
    counter = int.from_bytes(np.arange(n, dtype="<i8").tobytes(), "little")
    words = rounds([word * ones for word in key], stream * ones, counter, ones)
    return np.array([np.frombuffer(word.to_bytes(8 * n, "little"), "<i8") for word in words])


def _rounds_in_place(key: list[int], stream: int, low: Array) -> tuple[Array, Array]:
    """Encrypt in 32-bit arithmetic, whose sums wrap around; nothing is allocated on the way."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x, y = np.full_like(low, (stream + schedule[0]) & MASK), low + schedule[1]
    high_bits = np.empty_like(low)
    for injection in range(1, 6):
        for rotation in ROTATIONS[(injection - 1) % 2]:
            x += y
            np.right_shift(y, 32 - rotation, out=high_bits)
            y <<= rotation
            y |= high_bits
            y ^= x
        x += schedule[injection % 3]
        y += (schedule[(injection + 1) % 3] + injection) & MASK
    return x, y


def rounds(key: Sequence[Any], high: Any, low: Any, one: int = 1) -> tuple[Any, Any]:
    """Encrypt the counters `(high, low)`: 20 rounds, a key injection every 4.

    Words are tensors, arrays, or long integers of many words each; `one` is 1 in all of them.

    Returns:
        Two words for each counter.
    """
    mask = MASK * one
    schedule = (key[0], key[1], key[0] ^ key[1] ^ (PARITY * one))
    x, y = (high + schedule[0]) & mask, (low + schedule[1]) & mask
    for injection in range(1, 6):
        for rotation in ROTATIONS[(injection - 1) % 2]:
            x = (x + y) & mask
            y = (((y << rotation) | (y >> (32 - rotation))) & mask) ^ x
        x = (x + schedule[injection % 3]) & mask
        y = (y + schedule[(injection + 1) % 3] + injection * one) & mask
    return x, y
