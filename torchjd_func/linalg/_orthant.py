"""The positive root of `G w = w^(-1/alpha)`: the stationary point of alpha-fair bargaining."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.linalg._nnqp import Solution, min_norm_point
from torchjd_func.linalg._pivoting import KKT_TOL

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
    max_iter: int = 30,
    eps: float | None = None,
) -> Solution:
    r"""Find the positive root of $G w = w^{-1/\alpha}$.

    It is the minimiser over $w > 0$ of the strictly convex
    $$\tfrac12 w^\top G w - \sum_i \int w_i^{-1/\alpha} \mathrm d w_i,$$
    found by Newton's method with a line search, in float64, on unit rows: the accuracy does not
    depend on the lengths of the rows. The last step is differentiable, which makes the first
    derivative of the root exact.

    Zero rows take no part and get weight 0. There is no root where a convex combination of the
    other rows vanishes (`min_norm_point`), or where there are none: then the value is zero and
    `converged` is false.

    Args:
        gramian: `G`, `(..., m, m)`.
        alpha: Positive; a number, or a tensor of the leading dimensions of `gramian` or fewer.
        max_iter: Number of Newton steps, all of which are always computed; 6 to 12 do as a rule.
        eps: Relative rounding of the entries of `gramian`, by default that of its dtype.

    Returns:
        A `Solution`: its value is `w`, `(..., m)`.

    Raises:
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
    _check.interval("alpha", alpha, 0, open_low=True)
    wide = gramian.to(torch.float64)
    power = 1 / torch.as_tensor(alpha, dtype=torch.float64, device=wide.device).unsqueeze(-1)
    squares = wide.detach().diagonal(dim1=-2, dim2=-1)
    active = squares > 0
    lengths = torch.where(active, squares, 1.0).sqrt()
    unit = _unit_rows(wide, lengths, active)
    gap = min_norm_point(unit.detach())
    nearest = torch.einsum("...i,...ij,...j->...", gap.value, unit.detach(), gap.value)
    rounding = gramian.shape[-1] * (torch.finfo(gramian.dtype).eps if eps is None else eps)
    exists = (nearest > max(STATIONARY_TOL, rounding)) & gap.converged & active.any(-1)
    # Where there is no root the iteration would diverge, and spoil derivatives of other entries.
    identity = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    unit = torch.where(exists[..., None, None], unit, identity)
    # In x = |g| w the equation reads  unit @ x = |g|^(power - 1) x^(-power).
    log_gain = (power.detach() - 1) * lengths.log()
    x, iterations = _iterate(unit.detach(), log_gain, power.detach(), max_iter)
    correction = _newton(unit, (power - 1) * lengths.log(), power, x)
    converged = exists & (correction.detach().abs().amax(-1) <= KKT_TOL)
    root = torch.where(converged.unsqueeze(-1), x * (1 + correction), x) / lengths
    value = torch.where(active & exists.unsqueeze(-1), root, 0.0)
    return Solution(value.to(gramian.dtype), converged, iterations, torch.zeros_like(exists))


def _unit_rows(gramian: Tensor, lengths: Tensor, active: Tensor) -> Tensor:
    """Return the Gramian of the rows divided by their lengths; zero rows become unit rows."""
    unit = gramian / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)
    return unit + torch.diag_embed(torch.where(active, 0.0, torch.ones_like(lengths)))


def _iterate(unit: Tensor, log_gain: Tensor, power: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Iterate to `x > 0` with `unit @ x = gain x^-power`; a problem that is done stays.

    Returns:
        `x` and the number of steps that were taken.
    """
    x = _start(unit, log_gain, power)
    iterations = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    done = torch.zeros_like(iterations, dtype=torch.bool)
    for _ in range(max_iter):
        relative = _newton(unit, log_gain, power, x)
        step = _step_length(unit, log_gain, power, x, relative)
        done = done | (relative.abs().amax(-1) <= STEP_TOL)
        x = torch.where(done.unsqueeze(-1), x, x * (1 + step * relative))
        iterations = iterations + (~done).to(torch.int64)
    return x, iterations


def _start(unit: Tensor, log_gain: Tensor, power: Tensor) -> Tensor:
    """Return the root for orthogonal rows, scaled to the best point on its ray."""
    x = (log_gain / (1 + power)).exp()
    curvature = (x * _apply(unit, x)).sum(-1, keepdim=True)
    target = _target(log_gain, power, x).sum(-1, keepdim=True)
    ratio = target / torch.where(curvature > 0, curvature, target)
    return x * ratio ** (1 / (1 + power))


def _newton(unit: Tensor, log_gain: Tensor, power: Tensor, x: Tensor) -> Tensor:
    """Return Newton's step relative to `x`.

    In `r = sqrt(target) step / x` the Hessian is a positive semi-definite matrix plus `power I`, so
    the factorisation succeeds wherever `x` is; it is a constant of the derivative.
    """
    target = _target(log_gain, power, x)
    root = target.detach().sqrt()
    scale = x / root
    hessian = unit.detach() * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    hessian = hessian + torch.diag_embed(power.detach().expand_as(x))
    factor, _ = torch.linalg.cholesky_ex(hessian)
    residual = target / root - scale * _apply(unit, x)
    return torch.cholesky_solve(residual.unsqueeze(-1), factor).squeeze(-1) / root


def _step_length(
    unit: Tensor, log_gain: Tensor, power: Tensor, x: Tensor, relative: Tensor
) -> Tensor:
    """Return the longest step `(..., 1)` that stays positive and hardly passes the minimum.

    The objective is convex along the step, so its slope there tells on which side one is.
    """
    falling = torch.where(relative < 0, -1 / torch.where(relative < 0, relative, -1.0), torch.inf)
    longest = (BOUNDARY * falling.amin(-1, keepdim=True)).clamp(max=1)
    halves = 0.5 ** torch.arange(HALVINGS, dtype=x.dtype, device=x.device)
    steps = longest * halves  # (..., HALVINGS)
    target = _target(log_gain, power, x)
    constant = (relative * x * _apply(unit, x)).sum(-1, keepdim=True)
    linear = (relative * x * _apply(unit, relative * x)).sum(-1, keepdim=True)
    moved = 1 + steps.unsqueeze(-1) * relative.unsqueeze(-2)  # (..., HALVINGS, m)
    barrier = ((relative * target).unsqueeze(-2) * moved ** -power.unsqueeze(-1)).sum(-1)
    slope = constant + linear * steps - barrier
    decrement = (relative * target).sum(-1, keepdim=True) - constant
    allowed = slope <= 0.5 * decrement
    return torch.where(allowed, steps, steps[..., -1:]).amax(-1, keepdim=True)


def _target(log_gain: Tensor, power: Tensor, x: Tensor) -> Tensor:
    """Return `gain x^(1 - power)`, which `x * (unit @ x)` equals at the root."""
    return (log_gain + (1 - power) * x.log()).exp()


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `matrix @ x` over batches."""
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)
