"""Non-negative quadratic programs on the CPU by an active set: slower than pivoting, and sure."""

from __future__ import annotations

import numpy as np

from torchjd_func._host import Array
from torchjd_func.linalg._supports import SIGN_TOL, cut_out, push


def active_set(
    matrices: Array, which: Array, vectors: Array, start: Array | None = None
) -> tuple[Array, Array, Array]:
    """Free the steepest unknown, move to the minimum, pin what reaches zero; never go up.

    The objective falls with each full move. Where the row of the steepest unknown depends on those
    that are free, the descent is along a ray, until one of these reaches zero and makes room.

    C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23.

    Returns:
        `(z, support, iterations)`.
    """
    n, m = vectors.shape
    out, support = np.zeros_like(vectors), np.zeros((n, m), dtype=bool)
    iterations, place = np.zeros(n, dtype=np.int64), np.arange(n)
    z = out.copy() if start is None else start
    free, banned = z > 0, support.copy()
    moving = free.any(axis=1)
    for _ in range(10 * m + 10):
        slope = np.where(free | banned, np.inf, push(matrices, which, z) + vectors)
        entering = slope.argmin(axis=1)
        steepest = np.take_along_axis(slope, entering[:, None], axis=1)[:, 0]
        stay = moving | (steepest < -SIGN_TOL * (1 + np.abs(z).max(axis=1)))
        out[place], support[place] = z, free
        which, vectors, z, free, banned, moving, entering, place = (
            x[stay] for x in (which, vectors, z, free, banned, moving, entering, place)
        )
        if not len(place):
            break
        iterations[place] += 1
        new = (np.arange(m) == entering[:, None]) & ~moving[:, None]
        z, free, refused, moving = _move(matrices, which, vectors, z, free | new, new)
        banned = np.where(refused[:, None], banned | new, False)
    return out, support, iterations


def _move(
    matrices: Array, which: Array, vectors: Array, z: Array, free: Array, new: Array
) -> tuple[Array, Array, Array, Array]:
    """Go towards the minimum over the free unknowns until one of them reaches zero.

    Returns:
        `(z, free, refused, moving)`: a `new` unknown is refused if it would turn negative at once,
        or if nothing bounds the descent; `moving` says that the minimum is not reached yet.
    """
    target, independent = cut_out(matrices, which, free, -vectors)
    toward, straight = target - z, independent[:, None]
    ray = np.flatnonzero(~independent)
    if len(ray):
        toward[ray] = _ray(matrices, which[ray], free[ray] & ~new[ray], new[ray])
    falling = free & np.where(straight, target <= 0, toward < 0)
    ratio = np.where(falling, z / np.where(toward < 0, -toward, 1.0), np.inf)
    step = ratio.min(axis=1, keepdims=True)
    blocked = falling.any(axis=1)
    refused = np.where(independent, (falling & new).any(axis=1), ~blocked)
    moving = blocked & ~refused
    partial = np.where(free, z + np.where(blocked[:, None], step, 0.0) * toward, 0.0)
    pinned = falling & (ratio <= step) & moving[:, None]
    moved = np.where(pinned, 0.0, np.where(moving[:, None], partial, target))
    keep = refused[:, None]
    return np.where(keep, z, moved), np.where(keep, free & ~new, free & ~pinned), refused, moving


def _ray(matrices: Array, which: Array, free: Array, new: Array) -> Array:
    """Return the direction `Q d = 0` in which a new unknown grows, dependent on the free ones."""
    column = push(matrices, which, new.astype(matrices.dtype))
    return cut_out(matrices, which, free, -column)[0] + new
