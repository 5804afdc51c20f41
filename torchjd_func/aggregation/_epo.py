"""EPO search: go to the point of the Pareto front that a preference asks for.

D. Mahapatra, V. Rajan, Multi-Task Learning with User Preferences: Gradient Descent with Controlled
Ascent in Pareto Optimization, ICML 2020; extended in arXiv:2108.00597.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._lift import no_state, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, State, Weighting
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg import linear_program

# Relative losses are kept above this in the logarithm, which a zero loss would make infinite.
LOWEST = 1e-3


def _update(
    gramian: Tensor,
    state: State,
    losses: Tensor | None,
    *,
    preference: Vector,
    epsilon: float | Tensor,
    restricted: bool,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Balance the weighted losses, or descend along their ray."""
    _check.stateless("epo", state)
    wanted = resolve(preference, gramian, present)  # 0 where absent, and what it multiplies
    scaled = wanted * _check.losses_present("epo", losses)
    uneven, adjustment = _imbalance(scaled, wanted, _present.count(present, scaled))
    change = gramian @ adjustment  # of the imbalance, for each gradient
    balancing = uneven > epsilon
    worst = scaled == scaled.amax()
    helping = change > 0
    floor = torch.where(worst, 0.0, torch.where(helping, -torch.inf, change))
    floor = torch.where(balancing & helping.any(), floor, 0.0)
    goal = torch.where(balancing, change, gramian.sum(0))
    most = _present.only(present, change, -torch.inf).amax()
    lowest = most.clamp(max=0) if restricted else -torch.inf
    limit = torch.where(balancing, -torch.inf, lowest)
    size = wanted.amax() * gramian.abs().amax()
    uniform = _present.uniform(present, scaled)
    ones = _present.only(present, torch.ones_like(scaled))
    found, feasible = _solve(goal, gramian, floor, change, limit, size, ones)
    inverse = _present.only(present, 1 / _present.only(present, wanted, 1.0))
    weights = torch.where(feasible, found, inverse / inverse.sum())
    weights = torch.where(uneven.isnan(), uneven, weights)
    return torch.where(scaled.sum() <= 0, uniform, weights), state


def _imbalance(scaled: Tensor, preference: Tensor, m: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence of the weighted losses from uniform, and the adjustments `a`."""
    total = scaled.sum()
    relative = m * scaled / torch.where(total > 0, total, 1.0)
    logs = torch.where(relative > 0, relative, 1.0).log()
    uneven = (relative * logs).sum() / m
    return uneven, preference * (relative.clamp(min=LOWEST).log() - uneven)


def _solve(
    goal: Tensor,
    gramian: Tensor,
    floor: Tensor,
    change: Tensor,
    limit: Tensor,
    size: Tensor,
    ones: Tensor,
) -> tuple[Tensor, Tensor]:
    """Maximise `goal @ w`, `ones @ w = 1`, `w >= 0`, `gramian @ w >= floor`, `change @ w >= limit`.

    Each row is divided by its scale; a row without limit becomes `0 >= -1`. An absent objective
    has a column of zeros, which is in no basis.

    Returns:
        `w` and whether there is one.
    """
    m = len(goal)
    rows = torch.cat([gramian, change.unsqueeze(0)])
    limits = torch.cat([floor, limit.unsqueeze(0)])
    scales = torch.cat([gramian.abs().amax(-1), size.unsqueeze(0)])
    scales = torch.where(scales > 0, scales, 1.0).detach()
    bounded = limits > -torch.inf
    rows = torch.where(bounded.unsqueeze(-1), rows / scales.unsqueeze(-1), 0.0)
    limits = torch.where(bounded, torch.where(bounded, limits, 0.0) / scales, -1.0)
    slacks = torch.cat(
        [-torch.eye(m + 1, dtype=rows.dtype, device=rows.device), rows.new_zeros(1, m + 1)]
    )
    matrix = torch.cat([torch.cat([rows, ones.unsqueeze(0)]), slacks], dim=-1)
    objective = torch.cat([goal, goal.new_zeros(m + 1)])
    solution = linear_program(objective, matrix, torch.cat([limits, limits.new_ones(1)]))
    return solution.value[:m], solution.converged


def epo(
    preference: Numbers,
    *,
    epsilon: float | Tensor = 1e-4,
    restricted: bool = True,
) -> Aggregator:
    r"""Make the losses inversely proportional to a preference, then lower them together.

    The target is $r_1 L_1 = \dots = r_m L_m$ on the Pareto front. With
    $\hat l = r \circ L / r^\top L$, the imbalance is $\mu = \sum_i \hat l_i \log(m \hat l_i)$ and
    $a_i = r_i (\log(m \hat l_i) - \mu)$, $c = G a$. Then

    $$w = \arg\max_{w \in \Delta} w^\top c\ \ (\mu > \epsilon), \qquad
    w = \arg\max_{w \in \Delta} \mathbf 1^\top G w\ \ \text{(otherwise)},$$

    where, while balancing, losses that are too small may rise, and no loss may when descending.
    Losses are assumed to be at least 0. Solves one linear program in `m` unknowns, exactly; on the
    host, so that a CUDA graph cannot capture it.

    Args:
        preference: `r`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; positive: the larger an entry, the smaller that
            loss. A tensor may be vmapped or changed without recompiling.
        epsilon: Imbalance below which to descend.
        restricted: Keep the imbalance from growing, to first order, when descending.

    Returns:
        The Aggregator, without state; it needs `losses=`. If the program has no solution, the
        weights are proportional to `1 / r`; if all losses are 0, they are uniform.

    Raises:
        ValueError: If `preference` is not 1-D, not of the number of objectives, or not positive, or
            the losses are missing.

    Differs from other implementations:
        libmoon takes `1 / r` as its preference.
        The authors' search multiplies the step by `10 max(mu, 0.1)`; that is left to the optimiser.

    References:
        D. Mahapatra, V. Rajan, Multi-Task Learning with User Preferences: Gradient Descent with
        Controlled Ascent in Pareto Optimization, ICML 2020,
        https://proceedings.mlr.press/v119/mahapatra20a.html; extended in
        https://arxiv.org/abs/2108.00597

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> jd.epo([1.0, 1.0])(jac, losses=torch.tensor([1.0, 2.0]))[0]
        tensor([3.8502, 1.0000, 1.0000])
    """
    _check.flag("restricted", restricted)
    update = partial(
        _update,
        preference=_check.per_loss("preference", preference, low=0, open_low=True),
        epsilon=_check.interval("epsilon", epsilon, 0),
        restricted=restricted,
    )
    return weighted(Weighting("epo", no_state, update))
