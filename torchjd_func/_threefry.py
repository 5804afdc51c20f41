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


def step(key: Tensor, n: int, n_bits: int) -> tuple[Tensor, Array]:
    """Return the key of the next step, `split(key, 1)`, and `wide_bits` `(n,)` of this one."""
    plain = None if _on_device(key) else _host.numbers(key)
    if plain is None or n >= FEW:
        next_key = _host.tensor(encrypt(key, SPLIT, 1)).squeeze(-1)
        return next_key, wide_bits(key, (n,), n_bits)
    first, second = _encrypt_few(plain.tolist(), SPLIT << 64 * n, n, n + 1)
    pairs = _lanes(first << 32 | second, n + 1)
    next_key = np.array([pairs[n] >> 32, pairs[n] & MASK], dtype="i8")
    return torch.from_numpy(next_key), (pairs[:n] >> (64 - n_bits)).view("i8")


def encrypt(key: Tensor, stream: int, n: int) -> Array:
    """Encrypt the counters `0 ... n-1` of a stream; returns `(2, n)` int64, an array if plain."""
    if _on_device(key):
        return _host.opaque(words, _launch, key, stream, n, 0)
    plain = _host.numbers(key)
    if plain is None or n == 0:
        counter = torch.arange(n, dtype=torch.int64, device=key.device)
        return torch.stack(rounds(key.unbind(), torch.full_like(counter, stream), counter))
    if n <= FEW:
        few = _encrypt_few(plain.tolist(), stream * _ones(n), n, n)
        return np.array([_lanes(word, n).view("i8") for word in few])
    found = np.empty((2, n), dtype=np.int64)
    for start in range(0, n, BLOCK):
        counter = np.arange(start, min(start + BLOCK, n), dtype=np.uint32)
        found[:, start : start + BLOCK] = _rounds_in_place(plain.tolist(), stream, counter)
    return found


def _on_device(key: Tensor) -> bool:
    """Say whether a kernel encrypts: on CUDA, where the rounds are not compiled into one anyway."""
    return key.is_cuda and not torch.compiler.is_compiling()


def _launch(key: Tensor, stream: int, n: int, n_bits: int) -> Tensor:
    """Encrypt the counters `0 ... n-1` of a stream on a CUDA device.

    Args:
        key: `(..., 2)` int64.
        stream: The high counter word.
        n: How many.
        n_bits: Of a wide word; 0 for both words.

    Returns:
        `(..., 2, n)` int64, or `(..., n)` of wide words.
    """
    from torchjd_func._kernels.threefry import encrypt_kernel  # needs Triton

    found = encrypt_kernel(key.reshape(-1, 2), stream, n, n_bits)
    return found.reshape((*key.shape[:-1], *found.shape[1:]))


def _fake(key: Tensor, stream: int, n: int, n_bits: int) -> Tensor:
    """Tell the shape."""
    return key.new_empty((*key.shape[:-1], *(() if n_bits else (2,)), n))


words = _host.operation("threefry", _launch, _fake)


def _ones(n: int) -> int:
    """Return a long integer that is 1 in each of `n` places, 64 bits apart."""
    return ((1 << 64 * n) - 1) // ((1 << 64) - 1)


def _lanes(word: int, n: int) -> Array:
    """Return a long integer as `n` numbers."""
    return np.frombuffer(word.to_bytes(8 * n, "little"), "u8")


def _encrypt_few(key: list[int], high: int, n_counters: int, n: int) -> tuple[int, int]:
    """Encrypt counters that lie side by side in one long integer: `0, 1, ...`, then zeros."""
    ones = _ones(n)
    counter = int.from_bytes(np.arange(n_counters, dtype="u8").tobytes(), "little")
    return rounds([word * ones for word in key], high, counter, ones)


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
    # The 32 bits above those of a word hold what 26 sums carry, so that `x` is masked once.
    x, y = high + schedule[0], (low + schedule[1]) & mask
    for injection in range(1, 6):
        for rotation in ROTATIONS[(injection - 1) % 2]:
            x = x + y
            y = ((y << rotation | y >> (32 - rotation)) ^ x) & mask
        x = x + schedule[injection % 3]
        y = (y + schedule[(injection + 1) % 3] + injection * one) & mask
    return x & mask, y
