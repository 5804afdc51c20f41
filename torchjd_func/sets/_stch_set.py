"""STCH-Set: a few models that together serve many objectives.

X. Lin, Y. Liu, X. Zhang, F. Liu, Z. Wang, Q. Zhang, Few for Many: Tchebycheff Set Scalarization for
Many-Objective Optimization, ICLR 2025, arXiv:2405.19650.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._lift import no_state
from torchjd_func._names import Vector, entries
from torchjd_func._numbers import Numbers
from torchjd_func._types import State
from torchjd_func.sets._types import SetRule


def _update(
    gramians: Tensor,
    losses: Tensor,
    state: State,
    *,
    mu: float | Tensor,
    preference: Vector | None,
    reference: Vector | None,
    mu_set: float | Tensor | None,
) -> tuple[Tensor, State]:
    """Differentiate a smooth maximum over objectives of smooth minima over models."""
    _check.stateless("stch_set", state)
    m = losses.shape[1]
    smooth = mu if mu_set is None else mu_set
    shares = _entries("preference", preference, losses.new_full((m,), 1 / max(m, 1)))
    ideal = _entries("reference", reference, losses.new_zeros((m,)))
    least = -smooth * torch.logsumexp(-losses / smooth, dim=0)
    worst = torch.softmax(shares * (least - ideal) / mu, dim=0)
    return shares * worst * torch.softmax(-losses / smooth, dim=0), state


def _entries(name: str, value: Vector | None, default: Tensor) -> Tensor:
    """Return a number for each objective."""
    return default if value is None else entries(name, value, default)


def stch_set(
    mu: float | Tensor = 0.1,
    *,
    preference: Numbers | None = None,
    reference: Tensor | Sequence[float] | None = None,
    mu_set: float | Tensor | None = None,
) -> SetRule:
    r"""Move a set of models so that each objective is served well by one of them.

    $$d_k = J_k^\top \frac{\partial s}{\partial L_k}, \qquad
    s = \mu \log \sum_i \exp \frac{b_i (\ell_i - z_i)}{\mu}, \quad
    \ell_i = -\mu' \log \sum_k \exp \frac{-L_{ki}}{\mu'}.$$

    $s$ is a smooth form of $\max_i b_i (\min_k L_{ki} - z_i)$: the worst of the objectives, each by
    the model that is best at it. For `k` models and many more objectives; for one model it is the
    smooth Tchebycheff scalarization. Of the model that is best at an objective the gradient gets
    almost all of its weight, so that models specialise. Gramians are not used.

    Args:
        mu: Smoothness of the maximum, positive, in the unit of the losses. A tensor may be vmapped.
        preference: `b`, `(m,)`, a tensor or list in the order of the losses, or a dict, of which
            the values count in the order of its sorted names; uniform weights `1/m` by default. A
            tensor may be vmapped.
        reference: `z`, `(m,)`, losses that are ideal; 0 by default. A tensor may be vmapped.
        mu_set: Smoothness of the minimum; that of the maximum by default.

    Returns:
        The SetRule, without state.

    Raises:
        ValueError: If `mu` or `mu_set` is not positive, or vectors are not of the losses' size.

    References:
        X. Lin, Y. Liu, X. Zhang, F. Liu, Z. Wang, Q. Zhang, Few for Many: Tchebycheff Set
        Scalarization for Many-Objective Optimization, ICLR 2025, https://arxiv.org/abs/2405.19650

    Example:
        >>> import torch, torchjd_func as jd
        >>> losses = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
        >>> jd.sets.stch_set(0.5).weighting(torch.zeros(2, 2, 2), losses=losses)[0]
        tensor([[0.1321, 0.0066],
                [0.0024, 0.3590]])
    """
    options = {
        "mu": _check.interval("mu", mu, 0, open_low=True),
        "preference": _check.preference(preference),
        "reference": None if reference is None else _check.vector("reference", reference),
        "mu_set": _check.interval("mu_set", mu_set, 0, open_low=True, optional=True),
    }
    return SetRule("stch_set", no_state, partial(_update, **options), needs="size")
