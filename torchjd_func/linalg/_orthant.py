"""The positive root of `G w = (p / w)^(1/alpha)`: the stationary point of alpha-fair bargaining."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._host import Array
from torchjd_func.linalg._dense import ORDERS, solve, times
from torchjd_func.linalg._device import takes
from torchjd_func.linalg._nnqp import RIDGES, Solution, cast
from torchjd_func.linalg._search import nearest_on_host
from torchjd_func.linalg._systems import KKT_TOL

# Below this squared distance from 0, or `m` times the rounding of the Gramian if that is more, the
# convex hull of the unit rows is taken to contain 0.
STATIONARY_TOL = 1e-12
# A relative step this small ends the iteration.
STEP_TOL = 1e-13
# Part of the way to the boundary that a step may go, and how often a step may be halved.
BOUNDARY, HALVINGS = 0.95, 12


def orthant_root(
    gramian: Tensor,
    alpha: float | Tensor = 1.0,
    *,
    preference: Tensor | None = None,
    max_iter: int = 30,
    eps: float | None = None,
) -> Solution:
    r"""Find the positive root of $(G w)_i = (p_i / w_i)^{1/\alpha}$.

    It is the minimiser over $w > 0$ of the strictly convex
    $$\tfrac12 w^\top G w - \sum_i \int (p_i / w_i)^{1/\alpha} \mathrm d w_i,$$
    found by Newton's method with a line search, in float64, on unit rows: the accuracy does not
    depend on the lengths of the rows. Two derivatives of the root are exact.

    Zero rows take no part and get weight 0. There is no root where a convex combination of the
    other rows vanishes (`min_norm_point`), or where there are none: then the value is zero and
    `converged` is false. Where there is one, and the steps do not reach it, the value is
    not-a-number.

    Args:
        gramian: `G`, `(..., m, m)`.
        alpha: Positive; a number, or a tensor of the leading dimensions of `gramian` or fewer.
        preference: `p`, positive, `(..., m)`; 1 by default.
        max_iter: Largest number of Newton steps; typically 6 to 12 do.
        eps: Relative rounding of the entries of `gramian`, by default that of its dtype.

    Returns:
        A `Solution`: its value is `w`, `(..., m)`.

    Raises:
        TypeError: If `alpha` is no number, nor a tensor of such.
        ValueError: If `alpha` is a number that is not positive, or shapes do not fit.

    References:
        H. Ban, K. Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024,
        https://arxiv.org/abs/2402.15638

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.linalg.orthant_root(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).value
        tensor([0.5000, 1.0000])
    """
    _check.matrix("gramian", gramian)
    _check.integer("max_iter", max_iter)
    _check.interval("eps", eps, 0, optional=True, plain=True)
    if not isinstance(alpha, Tensor) or alpha.ndim == 0:
        _check.interval("alpha", alpha, 0, open_low=True)
    else:  # one for each problem
        _check.floating("`alpha`", alpha)
        _check.broadcastable("alpha", alpha.shape, "gramian", gramian.shape[:-2])
        _check.one_device("`gramian, alpha`", [gramian, alpha])
    wide = gramian.double()
    if isinstance(alpha, Tensor):
        power = 1 / _host.to(alpha, wide).unsqueeze(-1)
    else:
        power = wide.new_full((1,), 1 / alpha)
    shares = wide.new_ones(gramian.shape[-1]) if preference is None else _host.to(preference, wide)
    rounding = gramian.shape[-1] * (torch.finfo(gramian.dtype).eps if eps is None else eps)
    options = {"tol": max(STATIONARY_TOL, rounding), "max_iter": max_iter}
    known = _host.arrays(wide, power, shares)
    if known is not None:
        value, converged, iterations = map(_host.tensor, _search(*known, **options))
    else:
        value, converged, iterations = _find(wide, power, shares, **options)
    return cast(Solution(value, converged, iterations, converged & False), gramian.dtype)


def _find(
    gramian: Tensor, power: Tensor, shares: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Search, and take the last steps differentiably."""
    shape, m = _shape(gramian, power, shares), gramian.shape[-1]
    fixed = gramian.detach(), power.detach().expand(*shape, 1), shares.detach().expand(*shape, m)
    search = _IN_KERNEL if takes(gramian) else _ON_HOST
    value, converged, iterations = _host.opaque(search, _dispatch, *fixed, tol, max_iter)
    if not _host.unwatched(gramian, power, shares):
        value = value + _change(gramian, power, shares, value, converged)
    return value, converged, iterations


def _shape(gramian: Tensor, power: Tensor, shares: Tensor) -> torch.Size:
    """Return the shape of a batch of problems."""
    return torch.broadcast_shapes(gramian.shape[:-2], power.shape[:-1], shares.shape[:-1])


def _dispatch(
    gramian: Tensor, power: Tensor, shares: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Search for each problem of a batch, in a kernel what fits one, else on the host.

    Args:
        gramian: `(..., m, m)` float64.
        power: `(..., 1)` float64; leading dimensions broadcast.
        shares: `(..., m)` float64, positive.
        tol: Squared distance from 0 of the hull of the unit rows up to which there is no root.
        max_iter: Largest number of steps.

    Returns:
        The root `(..., m)`, `converged` `(...,)` bool, and `iterations` `(...,)` int64.
    """
    if not takes(gramian):
        return _host.in_numpy(_search, gramian, power, shares, tol, max_iter)
    from torchjd_func._kernels.orthant import root_kernel  # needs Triton

    shape, m = _shape(gramian, power, shares), gramian.shape[-1]
    matrices, powers = gramian.expand(*shape, m, m).reshape(-1, m, m), power.expand(*shape, 1)
    flat = matrices, powers.reshape(-1), shares.expand(*shape, m).reshape(-1, m)
    root, converged, steps = root_kernel(*flat, tol, max_iter)
    return root.reshape(*shape, m), converged.reshape(shape), steps.reshape(shape)


def _fake(gramian: Tensor, power: Tensor, shares: Tensor, tol: float, max_iter: int) -> Any:
    """Tell the shapes."""
    shape = _shape(gramian, power, shares)
    count = gramian.new_empty(shape, dtype=torch.int64)
    return gramian.new_empty((*shape, gramian.shape[-1])), count.bool(), count


_IN_KERNEL = _host.operation("orthant_root", _dispatch, _fake, broadcasts=True)
_ON_HOST = _host.operation("orthant_root_waits", _dispatch, _fake, waits=True, broadcasts=True)


@np.errstate(all="ignore")  # what is not finite is seen in the result
def _search(gramian: Array, power: Array, shares: Array, tol: float, max_iter: int) -> Any:
    """Return the root, 0 where there is none, whether it converged, and the number of steps."""
    active, lengths, unit = _unit_rows(np, gramian)
    hull = nearest_on_host(unit, RIDGES[torch.float64]).value
    distance = (hull * times(unit, hull)).sum(-1)
    exists = (distance > tol) & active.any(-1)
    # Where there is no root the iteration would diverge.
    unit = np.where(exists[..., None, None], unit, _host.identity(unit))
    # In x = |g| w the equation reads  unit @ x = |g|^(power - 1) p^power x^(-power).
    log_gain = (power - 1) * np.log(lengths) + power * np.log(shares)
    x, iterations = _iterate(unit, log_gain, power, max_iter)
    correction = _newton(np, unit, power, x, _target(np, log_gain, power, x), times(unit, x))
    left = np.abs(correction).max(axis=-1)
    small = left <= KKT_TOL
    # Rounding of nearly stationary rows leaves more, however many steps are taken.
    reached = small | (left <= tol / np.where(exists, distance, 1.0))
    root = np.where(small[..., None], x * (1 + correction), x) / lengths
    root = np.where(reached[..., None], root, np.nan)
    return np.where(active & exists[..., None], root, 0.0), exists & small, iterations


def _unit_rows(xp: Any, gramian: Array) -> tuple[Array, Array, Array]:
    """Return which rows are not zero, lengths, and the Gramian of unit rows; zero rows become."""
    squares = _host.constant(gramian).diagonal(0, -2, -1)
    active = squares > 0
    lengths = xp.sqrt(xp.where(active, squares, 1.0))
    unit = gramian / lengths[..., None] / lengths[..., None, :]
    return active, lengths, unit + _host.identity(gramian) * xp.where(active, 0.0, 1.0)[..., None]


def _change(
    gramian: Tensor, power: Tensor, shares: Tensor, value: Tensor, converged: Tensor
) -> Tensor:
    """Return 0 with the derivatives of the root, by more steps of Newton's method."""
    _, lengths, unit = _unit_rows(torch, gramian)
    # Where there is no root, a system without one would spoil derivatives of other entries.
    unit = torch.where(converged[..., None, None], unit, _host.identity(unit))
    inside = converged.unsqueeze(-1) & (value > 0)
    x = torch.where(inside, value * lengths, 1.0)
    log_gain = (power - 1) * torch.log(lengths) + power * torch.log(shares)
    moved = x
    for _ in range(ORDERS):
        target = _target(torch, log_gain, power, moved)
        moved = moved * (1 + _newton(torch, unit, power, moved, target, times(unit, moved)))
        moved = x + (moved - moved.detach())  # the value stays, and with it what is constant
    change = (moved - x) / lengths
    return torch.where(inside, change, 0.0)


def _iterate(unit: Array, log_gain: Array, power: Array, max_iter: int) -> tuple[Array, Array]:
    """Iterate to `x > 0` with `unit @ x = gain x^-power`; a problem that is done stays.

    Returns:
        `x` and the number of steps that were taken.
    """
    x = _start(unit, log_gain, power)
    done = x[..., 0] < 0
    iterations = done.astype(np.int64)
    for _ in range(max_iter):
        target, pushed = _target(np, log_gain, power, x), times(unit, x)
        relative = _newton(np, unit, power, x, target, pushed)
        done = done | (np.abs(relative).max(axis=-1) <= STEP_TOL)
        if done.all():
            break
        step = _step_length(unit, power, x, relative, target, pushed)
        x = np.where(done[..., None], x, x * (1 + step * relative))
        iterations = iterations + ~done
    return x, iterations


def _start(unit: Array, log_gain: Array, power: Array) -> Array:
    """Return the root for orthogonal rows, scaled to the best point on its ray."""
    x = np.exp(log_gain / (1 + power))
    curvature = (x * times(unit, x)).sum(axis=-1, keepdims=True)
    target = _target(np, log_gain, power, x).sum(axis=-1, keepdims=True)
    ratio = target / np.where(curvature > 0, curvature, target)
    return x * ratio ** (1 / (1 + power))


def _step_length(
    unit: Array, power: Array, x: Array, relative: Array, target: Array, pushed: Array
) -> Array:
    """Return the longest step `(..., 1)` that stays positive and hardly passes the minimum.

    The objective is convex along the step, so its slope there tells on which side one is.
    """
    lowest = relative.min(axis=-1, keepdims=True)
    step = np.where(lowest < -BOUNDARY, -BOUNDARY / np.where(lowest < 0, lowest, -1.0), 1.0)
    constant = (relative * x * pushed).sum(axis=-1, keepdims=True)
    linear = (relative * x * times(unit, relative * x)).sum(axis=-1, keepdims=True)
    gain = relative * target
    limit = 0.5 * (gain.sum(axis=-1, keepdims=True) - constant)
    for _ in range(HALVINGS - 1):
        barrier = (gain * (1 + step * relative) ** -power).sum(axis=-1, keepdims=True)
        passed = constant + linear * step - barrier > limit
        if not passed.any():
            break
        step = np.where(passed, 0.5 * step, step)
    return step


def _newton(xp: Any, unit: Array, power: Array, x: Array, target: Array, pushed: Array) -> Array:
    """Return Newton's step relative to `x`.

    In `r = sqrt(target) step / x` the Hessian is a positive semi-definite matrix plus `power I`, so
    it is regular wherever `x` is; it is a constant of the derivative.
    """
    root = xp.sqrt(_host.constant(target))
    scale = x / root
    hessian = _host.constant(unit) * scale[..., None] * scale[..., None, :]
    hessian = hessian + _host.constant(power)[..., None] * _host.identity(hessian)
    return solve(hessian, target / root - scale * pushed) / root


def _target(xp: Any, log_gain: Array, power: Array, x: Array) -> Array:
    """Return `gain x^(1 - power)`, which `x * (unit @ x)` equals at the root."""
    return xp.exp(log_gain + (1 - power) * xp.log(x))
