"""Nash-MTL: the gradients bargain over the update.

A. Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv:2202.01017.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._lift import weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, Weighting
from torchjd_func.aggregation._preference import shares_of
from torchjd_func.linalg import orthant_root


class NashMTLState(NamedTuple):
    """The last solution of the bargaining problem, before it is clipped."""

    weights: Tensor  # (m,) float64
    age: Tensor  # (m,) int64, number of calls that used a weight; 0 if it is due


def _init(statistic: Tensor, key: Tensor | None) -> NashMTLState:
    """Start without weights; the first call solves."""
    m = statistic.shape[:1]
    age = statistic.new_zeros(m, dtype=torch.int64)
    return NashMTLState(statistic.new_zeros(m, dtype=torch.float64), age)


def _update(
    gramian: Tensor,
    state: NashMTLState,
    losses: Tensor | None,
    *,
    max_norm: float | Tensor | None,
    update_every: int,
    preference: Vector | None,
    present: Tensor | None = None,
) -> tuple[Tensor, NashMTLState]:
    """Solve `G a = p / a` if it is time to, and clip the length of the direction."""
    _check.state_type("nash_mtl", state, NashMTLState)
    _check.state("nash_mtl", "weights", state.weights, gramian.shape[:1])
    wide, eps = gramian.to(torch.float64), torch.finfo(gramian.dtype).eps
    shares = shares_of(preference, wide, present)
    solved = orthant_root(wide, preference=shares, eps=eps).value
    due = (_present.only(present, state.age, 1) == 0).any()
    age = (torch.where(due, 0, state.age) + 1) % update_every
    solution = NashMTLState(torch.where(due, solved, state.weights), age)
    next_state = _present.renewed(present, solution, state)
    weights = next_state.weights
    if max_norm is None:
        return weights, next_state
    square = weights @ wide @ weights
    length = torch.where(square > 0, square, 1.0).sqrt()
    return weights * (max_norm / length).clamp(max=1), next_state


def nash_mtl(
    max_norm: float | Tensor | None = None,
    update_every: int = 1,
    *,
    preference: Numbers | None = None,
) -> Aggregator:
    r"""Agree on the update that maximises the product of the gains of all objectives.

    $$d = J^\top a, \qquad a > 0, \qquad (G a)_i = p_i / a_i.$$

    $d$ maximises $\sum_i p_i \log g_i^\top d$ among vectors of its length, the root of the sum of
    `p`. Every objective improves, by $g_i^\top d = p_i / a_i$, and the lengths of the gradients do
    not matter.
    Zero gradients are left out of the game. Where the others are Pareto stationary there is no
    agreement, and `d` is zero. Solved exactly by Newton's method in `m` unknowns; the state holds
    the last solution.

    Args:
        max_norm: The longest allowed `d`; longer ones are shortened. `None`: no limit. A 0-d tensor
            may be vmapped or changed without recompiling.
        update_every: Solve at calls 0, k, 2k ... and keep those weights in between, as in the
            paper's experiments. Both are computed at each call, so it saves no time. A call that
            has an objective without a weight solves as well.
        preference: `p`, the bargaining powers, `(m,)`, a tensor or list in the order of the losses
            (of a dict: of their sorted names), or a dict by these names; positive, 1 for each by
            default. A tensor may be vmapped.

    Returns:
        The Aggregator, with state.

    Raises:
        ValueError: If `max_norm` or a number in `preference` is not positive, or `update_every` is
            not a positive int.

    Differs from other implementations:
        The authors' code, LibMTL and TorchJD clip `d` to length 1 (`max_norm=1.0`).
        They iterate a convex-concave procedure from ones, which returns ones, silently, for some
        gradients that conflict with their sum; the root is exact here, whatever came before.
        They fail for one objective and for zero gradients.
        The bargain has equal powers there; `preference` is the asymmetric solution.

    References:
        A. Navon, A. Shamsian, I. Achituve, H. Maron, K. Kawaguchi, G. Chechik, E. Fetaya,
        Multi-Task Learning as a Bargaining Game, ICML 2022, https://arxiv.org/abs/2202.01017.
        E. Kalai, Nonsymmetric Nash Solutions and Replications of 2-Person Bargaining, International
        Journal of Game Theory 6, 1977, https://doi.org/10.1007/BF01774658

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.nash_mtl()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.0766, 0.9985, 0.9985])
    """
    _check.interval("max_norm", max_norm, 0, open_low=True, optional=True)
    _check.integer("update_every", update_every)
    shares = _check.shares(preference)
    options = {"max_norm": max_norm, "update_every": update_every, "preference": shares}
    update = partial(_update, **options)
    return weighted(Weighting("nash_mtl", _init, update, widen=False))
