"""SDMGrad: stochastic direction-oriented multi-objective gradient descent.

P. Xiao, H. Ban, K. Ji, Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
Algorithms, NeurIPS 2023, arXiv:2305.18409.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check, _host, _present
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Weighting
from torchjd_func.aggregation._preference import resolve
from torchjd_func.aggregation._rows import safe_sqrt
from torchjd_func.linalg import project_simplex
from torchjd_func.linalg._eigh import eigh
from torchjd_func.linalg._nnqp import RIDGES, nearest, products_with

# Eigenvalues below this part of the largest are rounding.
NEGATIVE = 1e-12
EPS = torch.finfo(torch.float64).eps


class SDMGradState(NamedTuple):
    """The weights, where the iterative solvers start."""

    weights: Tensor  # (m,) float64, on the simplex


def _init(statistic: Tensor, key: Tensor | None) -> SDMGradState:
    """Start from uniform weights."""
    m = statistic.shape[0]
    return SDMGradState(statistic.new_full((m,), 1 / max(m, 1), dtype=torch.float64))


def _update(
    cross_gramian: Tensor,
    state: SDMGradState,
    losses: Tensor | None,
    *,
    lambda_: float | Tensor,
    preference: Vector | None,
    solver: Callable[..., Tensor],
    present: Tensor | None = None,
) -> tuple[Tensor, SDMGradState]:
    """Find the weights, and mix the target into them."""
    _check.state_type("sdmgrad", state, SDMGradState)
    _check.state("sdmgrad", "weights", state.weights, cross_gramian.shape[:1])
    pull = lambda_ * resolve(preference, cross_gramian, present)
    weights = solver(cross_gramian, pull, _present.alone(present, state.weights), present)
    after = SDMGradState(_present.together(present, weights, state.weights))
    return (weights + pull) / (1 + lambda_), after


def _exact(matrix: Tensor, pull: Tensor, weights: Tensor, present: Tensor | None) -> Tensor:
    """Find the min-norm point of the rows shifted by the pull."""
    gramian = _positive_part(matrix)
    along = products_with(gramian, pull, EPS)
    shifted = gramian + along.unsqueeze(-1) + along + pull @ along
    # A row that the pull balances is 0 but for rounding, which has no direction.
    lengths = safe_sqrt(gramian.detach().diagonal())
    rounding = len(pull) * EPS * (lengths + lengths @ pull.detach()).square()
    kept = shifted.detach().diagonal() > rounding
    shifted = torch.where(kept & kept.unsqueeze(-1), shifted, 0.0)
    if present is not None:
        shifted = _present.apart(_present.statistic(shifted, present), present)
    return nearest(shifted, RIDGES[torch.float64]).value


def _positive_part(matrix: Tensor) -> Tensor:
    """Return the nearest symmetric positive semi-definite matrix; a Gramian stays as it is."""
    symmetric = 0.5 * (matrix + matrix.mT)
    known = _host.numbers(symmetric)
    if known is not None and _has_factor(known):
        return symmetric
    values, vectors = eigh(symmetric)
    negative = torch.where(values < -NEGATIVE * values.abs().amax(-1), -values, 0.0)
    return symmetric + (vectors * negative) @ vectors.mT


def _has_factor(matrix: np.ndarray) -> bool:
    """Say whether a Cholesky factor, which is quickly found, shows that nothing is negative."""
    slack = NEGATIVE * np.abs(matrix.diagonal()).max(initial=0.0)
    try:
        np.linalg.cholesky(matrix + slack * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        return False
    return True


def _pgd(
    matrix: Tensor, pull: Tensor, weights: Tensor, present: Tensor | None, *, n_iter: int
) -> Tensor:
    """Iterate projected gradient steps of length one over the norm of the matrix."""
    largest = matrix.detach().abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    unit = matrix / largest  # whose squares are in range
    # At a fixed vector of the largest gain, the gain has the derivative of the norm.
    gain = unit @ eigh(unit.mT @ unit)[1][:, -1]
    norm = safe_sqrt(gain @ gain)
    step = torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0) / largest
    for _ in range(n_iter):
        moved = weights - step * (matrix @ (weights + pull))
        weights = project_simplex(_present.only(present, moved, -torch.inf))
    return weights


def _reference(
    matrix: Tensor,
    pull: Tensor,
    weights: Tensor,
    present: Tensor | None,
    *,
    n_iter: int,
    lr: float,
    momentum: float,
) -> Tensor:
    """Iterate as the authors' code: long steps with momentum on the normalised matrix."""
    length = _present.mean(present, safe_sqrt(matrix.diagonal()))
    normalized = matrix / (length.square() + 1e-8)
    velocity = torch.zeros_like(weights)
    for _ in range(n_iter):
        velocity = momentum * velocity + normalized @ (weights + pull)
        weights = project_simplex(_present.only(present, weights - lr * velocity, -torch.inf))
    return weights


def sdmgrad(
    lambda_: float | Tensor = 0.3,
    preference: Numbers | None = None,
    solver: str = "exact",
    *,
    n_iter: int = 20,
    lr: float = 10.0,
    momentum: float = 0.5,
) -> Weighting:
    r"""Compromise between the min-norm direction and a target direction.

    $$\min_{w \in \Delta} \tfrac12 \lVert J^\top (w + \lambda \tilde w) \rVert^2, \qquad
    \text{weights} = (w + \lambda \tilde w) / (1 + \lambda).$$

    `lambda_ = 0` is MGDA, and large values follow the target $J^\top \tilde w$. On
    $M = J_1 J_2^\top$ of two independent batches, the slope $M (w + \lambda \tilde w)$ is unbiased.
    The state holds $w$, where `"pgd"` and `"reference"` start.

    Args:
        lambda_: $\lambda \ge 0$; a 0-d tensor may be vmapped or changed without recompiling.
        preference: $\tilde w$, `(m,)`, a tensor or list in the order of the losses (of a dict: of
            their sorted names), or a dict by these names; uniform weights `1/m` by default. It may
            be vmapped too.
        solver: `"exact"`, the minimum, for a Gramian; of a cross-Gramian the nearest symmetric
            positive semi-definite matrix is taken. `"pgd"`, `n_iter` projected gradient steps of
            length $1 / \lVert M \rVert_2$, for a cross-Gramian as it is. `"reference"`, the
            published loop, which does not converge with its published step.
        n_iter: Steps of `"pgd"` and `"reference"`.
        lr: Step of `"reference"`; stable below 1.
        momentum: Of `"reference"`.

    Returns:
        The Weighting of a cross-Gramian; `jd.weighted` makes it an Aggregator of a single batch.

    Raises:
        ValueError: If a number is out of its range, the solver is unknown, or `preference` is not
            1-D, not of the number of objectives, or negative.

    Differs from other implementations:
        TorchJD iterates the published loop, which bounces between faces of the simplex
        (`solver="reference"` gives its numbers); the minimum is exact here.
        The authors' class has `lambda_=0.6`, their experiments 0.3; LibMTL has `lr=5`.
        The authors' code multiplies the result by the number of objectives.

    References:
        P. Xiao, H. Ban, K. Ji, Direction-oriented Multi-objective Learning: Simple and Provable
        Stochastic Algorithms, NeurIPS 2023, https://arxiv.org/abs/2305.18409

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.sdmgrad(lambda_=10.0)(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))[0]
        tensor([0.5455, 0.4545])
    """
    _check.choice("solver", solver, ("exact", "pgd", "reference"))
    _check.interval("lambda_", lambda_, 0)
    _check.integer("n_iter", n_iter)
    _check.interval("lr", lr, 0, open_low=True)
    _check.interval("momentum", momentum, 0, 1, open_high=True)
    solvers: dict[str, Callable[..., Tensor]] = {
        "exact": _exact,
        "pgd": partial(_pgd, n_iter=n_iter),
        "reference": partial(_reference, n_iter=n_iter, lr=lr, momentum=momentum),
    }
    update = partial(
        _update,
        lambda_=lambda_,
        preference=_check.preference(preference),
        solver=solvers[solver],
    )
    return Weighting("sdmgrad", _init, update, needs="cross_gramian")
