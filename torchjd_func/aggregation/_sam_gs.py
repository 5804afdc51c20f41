"""SAM-GS: similarity-aware momentum gradient surgery.

T. Borsani, A. Rosani, G. Nicosia, G. Di Fatta, Gradient Similarity Surgery in Multi-Task Deep
Learning, 2025, arXiv:2506.06130.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._types import Aggregator, PyTree
from torchjd_func.aggregation import _rows

NAME = "sam_gs"
TINY = torch.finfo(torch.float64).tiny  # divides by this instead of by zero


class SAMGSState(NamedTuple):
    """Running means of the gradients, and of how unlike their lengths are."""

    averages: PyTree  # like the Jacobian, in float32 or better
    step: Tensor  # (m,) int64, number of gradients in an average
    spread: Tensor  # () float64
    calls: Tensor  # () int64


def _init(jac: PyTree, key: Tensor | None) -> SAMGSState:
    """Start from zeros."""
    leaf, m = _tree.leaves(jac)[0], _tree.leading_size(jac)
    count = leaf.new_zeros((m,), dtype=torch.int64)
    spread = leaf.new_zeros((), dtype=torch.float64)
    return SAMGSState(_rows.zeros_like(jac), count, spread, torch.zeros_like(count.sum()))


def _update(
    jac: PyTree,
    state: SAMGSState,
    losses: Tensor | None,
    *,
    gamma: float | Tensor,
    beta_1: float | Tensor,
    beta_2: float | Tensor,
    eps: float,
    present: Tensor | None = None,
) -> tuple[PyTree, SAMGSState]:
    """Equalise lengths that are unlike, else modulate by the momentum."""
    _check.state_type(NAME, state, SAMGSState)
    _rows.check(NAME, "averages", state.averages, jac)
    norms = _rows.norms(jac)
    similar = _similarity(norms, present)
    averages = _rows.interpolate(state.averages, jac, norms.new_ones(()) - beta_1, None)
    averages = _present.renewed(present, averages, state.averages)
    step = state.step + (1 if present is None else present)
    spread = beta_2 * state.spread + (1 - beta_2) * (1 - similar) ** 2 + eps
    after = SAMGSState(averages, step, spread, state.calls + 1)

    root = (spread / (1 - beta_2 ** after.calls.double())).sqrt()
    share = 1 / ((1 - beta_1 ** step.clamp(min=1).double()) * root)
    equal = torch.where(norms > 0, _present.mean(present, norms) / norms.clamp(min=TINY), 0.0)
    combine = partial(_combine, alike=similar >= gamma, equal=equal, share=share)
    return _tree.map(combine, jac, averages), after


def _combine(
    leaf: Tensor, average: Tensor, *, alike: Tensor, equal: Tensor, share: Tensor
) -> Tensor:
    """Add the rows of a leaf, each entry with a weight."""
    rows = _tree.real(leaf).to(average.dtype)
    modulated = average.abs() * _tree.per_row(share, rows).to(rows.dtype)
    weights = torch.where(alike, modulated, _tree.per_row(equal, rows).to(rows.dtype))
    return _tree.row_like((weights * rows).sum(0), leaf)


def _similarity(norms: Tensor, present: Tensor | None) -> Tensor:
    """Return the mean of `2ab / (a^2 + b^2)` over pairs of lengths; 1 where there is no pair."""
    here = torch.ones_like(norms) if present is None else present.to(norms)
    pairs = (here.unsqueeze(-1) * here).triu(1)
    squares = norms.square().unsqueeze(-1) + norms.square()
    alike = 2 * norms.unsqueeze(-1) * norms / torch.where(squares > 0, squares, 1.0)
    alike = torch.where(squares > 0, alike, 1.0)
    return torch.where(pairs.sum() > 0, (alike * pairs).sum() / pairs.sum().clamp(min=1), 1.0)


def sam_gs(
    gamma: float | Tensor = 0.1,
    *,
    beta_1: float | Tensor = 0.9,
    beta_2: float | Tensor = 0.99,
    eps: float = 1e-8,
) -> Aggregator:
    r"""Add gradients made equally long where their lengths differ much, else weighted by momentum.

    With $\sigma$ the mean of $2 ab / (a^2 + b^2)$ over pairs of lengths of gradients,
    $$d = \frac1m \sum_j \lVert g_j \rVert \sum_i \frac{g_i}{\lVert g_i \rVert}
    \text{ if } \sigma < \gamma, \text{ else }
    d = \sum_i g_i \odot \frac{|\hat m_i|}{\sqrt{\hat v}},$$

    with $\hat m_i$ the running mean of $g_i$, and $\hat v$ that of $(1 - \sigma)^2$, both corrected
    for their start as in AdaBelief. The second is quadratic in the gradients, so that the learning
    rate depends on their scale. Needs the rows. The state holds running means of the size of the
    Jacobian.

    Args:
        gamma: Similarity below which lengths are made equal, in `[0, 1]`.
        beta_1: Share of the past in the means of the gradients.
        beta_2: Share of the past in the mean of the dissimilarity.
        eps: Added to the mean of the dissimilarity at each call.

    Returns:
        The Aggregator, with state.

    Raises:
        ValueError: If an option is out of range.

    Differs from other implementations:
        The authors' code multiplies `d` by the number of objectives.
        A zero gradient makes it not-a-number there; it adds nothing here.

    References:
        T. Borsani, A. Rosani, G. Nicosia, G. Di Fatta, Gradient Similarity Surgery in Multi-Task
        Deep Learning, 2025, https://arxiv.org/abs/2506.06130

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.sam_gs(0.5)(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))[0]
        tensor([1.7500, 1.7500])
    """
    options = {
        "gamma": _check.interval("gamma", gamma, 0, 1),
        "beta_1": _check.interval("beta_1", beta_1, 0, 1, open_high=True),
        "beta_2": _check.interval("beta_2", beta_2, 0, 1, open_high=True),
        "eps": _check.interval("eps", eps, 0, plain=True),
    }
    return Aggregator(NAME, _init, partial(_update, **options))
