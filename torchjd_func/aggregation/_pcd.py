"""PCD: follow a primary objective while every secondary one progresses enough.

D. Varam, M. I. AlHajri, Not All Objectives Are Born Equal: Priority-Constrained Descent for
Hierarchical Multi-Objective Optimization, TMLR 2026, arXiv:2606.29521.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _host, _present
from torchjd_func._host import Array
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, Weighting
from torchjd_func.linalg._nnqp import RIDGES, solve

# Squared length, relative to that of its parts, below which a direction is rounding.
CANCELLED = 10 * torch.finfo(torch.float64).eps
# One over the squared relative length of the shift above which no shift is thought to do.
INFEASIBLE = 1e-11


class PCDState(NamedTuple):
    """The average of the squared gradient lengths."""

    ema: Tensor  # (m,) float64
    visits: Tensor  # (m,) int64, how often each objective was there


def _init(statistic: Tensor, key: Tensor | None) -> PCDState:
    """Start from zero; the average is corrected for it."""
    m = statistic.shape[:1]
    visits = statistic.new_zeros(m, dtype=torch.int64)
    return PCDState(statistic.new_zeros(m, dtype=torch.float64), visits)


def _update(
    gramian: Tensor,
    state: PCDState,
    losses: Tensor | None,
    *,
    tau: float | Tensor,
    beta: float | Tensor,
    eps: float | Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, PCDState]:
    """Normalise, solve, and give the result the length of the primary gradient."""
    _check.state_type("pcd", state, PCDState)
    _check.state("pcd", "ema", state.ema, gramian.shape[:1])
    _check.state("pcd", "visits", state.visits, gramian.shape[:1])
    if gramian.shape[0] > 1:
        _check.secondary("tau", tau, gramian.shape[0] - 1)
    tau, beta, eps = (x.double() if isinstance(x, Tensor) else x for x in (tau, beta, eps))
    if present is None:
        weights, *kept = _host.call(_descend, gramian, *state, tau, beta, eps)
        return weights, PCDState(*kept)
    # The first that is there is the primary objective: the order of the rows is not kept.
    order = (~present).to(torch.int8).argsort(stable=True)
    back = order.argsort()
    if isinstance(tau, Tensor) and tau.ndim:
        tau = torch.cat([tau.new_zeros(1), tau])[order][1:]
    gramian, ema, visits = gramian[order][:, order], state.ema[order], state.visits[order]
    weights, *kept = _host.call(_descend, gramian, ema, visits, tau, beta, eps)
    renewed = PCDState(*(x[back] for x in kept))
    return weights[back], _present.renewed(present, renewed, state)


def _descend(
    xp: Any, gramian: Array, old: Array, n_visits: Array, tau: Array, beta: Array, eps: Array
) -> tuple[Array, Array, Array]:
    """Find the weights, and the state; both as before if the Gramian is not finite."""
    squares, visits = gramian.diagonal(), n_visits + 1
    ema = beta * old + (1 - beta) * squares
    mean_square = ema / (1 - beta ** (visits + 0 * old)) + eps
    nothing = mean_square <= 0
    scale = _host.filled(1 / xp.sqrt(_host.filled(mean_square, nothing, 1.0)), nothing, 0.0)
    normalized = gramian * scale[:, None] * scale
    coordinates = _solve(xp, normalized, tau)
    square = coordinates @ normalized @ coordinates
    longest = (coordinates * xp.sqrt(xp.clip(normalized.diagonal(), 0.0, None))).sum()
    none = ~((square > CANCELLED * longest * longest) & (squares[0] > 0))
    ratio = _host.filled(squares[0], none, 1.0) / _host.filled(square, none, 1.0)
    weights = _host.filled(xp.sqrt(ratio) * scale * coordinates, none, 0.0)
    finite = xp.isfinite(gramian).all()
    kept = xp.where(finite, ema, old), xp.where(finite, visits, n_visits)
    return xp.where(finite, weights, xp.nan), *kept


def _solve(xp: Any, gramian: Array, tau: float | Array) -> Array:
    """Project the primary gradient on the constraints; drop these if they cannot be met.

    The shift of the primary gradient is the shortest vector with products of at least `short` with
    the secondary ones. That is a non-negative least-squares problem (Lawson and Hanson, Solving
    Least Squares Problems, 1974, chapter 23.4), whose residual tells whether there is any.

    Returns:
        `(1, mu)`, `(m,)`, with the multipliers of the secondary objectives.
    """
    primary = xp.ones_like(gramian[:1, 0])
    if gramian.shape[0] == 1:
        return primary
    secondary = gramian[1:, 1:]
    short = tau * secondary.diagonal() - gramian[1:, 0]
    largest = xp.amax(xp.abs(_host.constant(short)), -1)
    unit = short / _host.filled(largest, largest <= 0, 1.0)
    multipliers = _multipliers(secondary + unit[:, None] * unit, -unit)
    residual = 1 - unit @ multipliers
    infeasible = ~(residual > INFEASIBLE)
    shift = multipliers * largest / _host.filled(residual, infeasible, 1.0)
    return xp.concatenate([primary, _host.filled(shift, infeasible, 0.0)])


def _multipliers(matrix: Array, vector: Array) -> Array:
    """Solve the non-negative quadratic program, of arrays or tensors."""
    value = solve(matrix, vector, RIDGES[torch.float64]).value
    return value if isinstance(matrix, Tensor) else value.numpy()


def pcd(
    tau: float | Tensor | Sequence[float] = 0.02,
    beta: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
) -> Aggregator:
    r"""Follow the first gradient as closely as the progress of the others allows.

    $$\tilde d = \arg\min_d \tfrac12 \lVert d - \tilde g_1 \rVert^2 \quad \text{s.t.}\quad
    \tilde g_j^\top d \ge \tau_j \lVert \tilde g_j \rVert^2,\ j \ge 2, \qquad
    d = \tilde d\, \lVert g_1 \rVert / \lVert \tilde d \rVert,$$

    where $\tilde g_i = g_i / \sqrt{\hat v_i + \epsilon}$, and $\hat v_i$ is the average of
    $\lVert g_i \rVert^2$ over the calls that had it, kept in the state. The first objective is the
    primary one, or, where it is absent, the first that is present; it is sacrificed where the
    secondary ones oppose it. If the constraints exclude
    each other they are dropped. Solves one quadratic program in `m - 1` unknowns, exactly.

    Args:
        tau: Progress of each secondary objective, as a fraction of that along its own gradient; one
            number, or `(m - 1,)`. Tensors may be vmapped or changed without recompiling.
        beta: Decay of the average, in `[0, 1)`.
        eps: Added to the average, in squared units of the gradients.

    Returns:
        The Aggregator, with state.

    Raises:
        ValueError: If a number is out of its range, or `tau` is of the wrong length.

    Differs from other implementations:
        The reference implementation enumerates working sets, TorchJD uses a dual active-set method;
        the numbers agree. In float32, TorchJD counts rows that depend up to rounding as dependent,
        which matters only where the constraints exclude each other.

    References:
        D. Varam, M. I. AlHajri, Not All Objectives Are Born Equal: Priority-Constrained Descent for
        Hierarchical Multi-Objective Optimization, TMLR 2026, https://arxiv.org/abs/2606.29521

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.pcd(tau=0.5)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([2.0889, 2.6112, 2.6112])
    """
    update = partial(
        _update,
        tau=_check.numbers("tau", tau),
        beta=_check.interval("beta", beta, 0, 1, open_high=True),
        eps=_check.interval("eps", eps, 0),
    )
    return weighted(Weighting("pcd", _init, update))
