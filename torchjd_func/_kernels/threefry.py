"""Threefry-2x32 on a GPU: one launch, the bits of `_threefry`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torchjd_func._kernels.pivoting import start

BLOCK = 256  # counters of a program


@triton.jit
def _round(x, y, left: tl.constexpr):
    """Mix the words."""
    x = (x + y) & 0xFFFFFFFF
    return x, (((y << left) | (y >> (32 - left))) & 0xFFFFFFFF) ^ x


@triton.jit
def _rounds(x, y, a, b, step: tl.constexpr):
    """Take four rounds, with two kinds of rotations in turn, and inject the key."""
    odd: tl.constexpr = step % 2 == 1
    x, y = _round(x, y, 13 if odd else 17)
    x, y = _round(x, y, 15 if odd else 29)
    x, y = _round(x, y, 26 if odd else 16)
    x, y = _round(x, y, 6 if odd else 24)
    return (x + a) & 0xFFFFFFFF, (y + b + step) & 0xFFFFFFFF


@triton.jit(do_not_specialize=["n", "per", "stream", "n_bits"])
def _encrypt(KEYS, WORDS, n, per, stream, n_bits, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Encrypt one of `per` blocks of a key, in 64-bit arithmetic; wide, to one number."""
    block = tl.program_id(0).to(tl.int64)  # other axes of a grid end at 65,535
    pid = block // per
    low = (block - pid * per) * BLOCK + tl.arange(0, BLOCK)
    first, second = tl.load(KEYS + 2 * pid), tl.load(KEYS + 2 * pid + 1)
    third = first ^ second ^ 0x1BD11BDA
    x, y = (stream + first) & 0xFFFFFFFF, (low + second) & 0xFFFFFFFF
    x = x + 0 * y
    x, y = _rounds(x, y, second, third, 1)
    x, y = _rounds(x, y, third, first, 2)
    x, y = _rounds(x, y, first, second, 3)
    x, y = _rounds(x, y, second, third, 4)
    x, y = _rounds(x, y, third, first, 5)
    if WIDE:
        wide = ((x << 32) | y) >> (64 - n_bits)
        mask = (low * 0 + 1 << n_bits) - 1
        tl.store(WORDS + pid * n + low, wide & mask, mask=low < n)
    else:
        out = WORDS + pid * 2 * n + low
        tl.store(out, x, mask=low < n)
        tl.store(out + n, y, mask=low < n)


def encrypt_kernel(keys: Tensor, stream: int, n: int, n_bits: int = 0) -> Tensor:
    """Encrypt the counters `0 ... n-1` for keys `(k, 2)`.

    Args:
        keys: `(k, 2)` int64.
        stream: The high counter word.
        n: How many.
        n_bits: Of a wide word; 0 for both words.

    Returns:
        Two words `(k, 2, n)` for each counter, or wide ones `(k, n)`.
    """
    shape = (len(keys), n) if n_bits else (len(keys), 2, n)
    words = keys.new_empty(shape)
    if words.numel():
        per = triton.cdiv(n, BLOCK)
        sizes = n, per, stream, n_bits, n_bits > 0, BLOCK
        start(_encrypt, len(keys) * per, 4, keys.contiguous(), words, *sizes)
    return words
