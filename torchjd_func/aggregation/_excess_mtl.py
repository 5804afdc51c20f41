"""ExcessMTL: robust multi-task learning with excess risks.

Y. He, S. Zhou, G. Zhang, H. Yun, Y. Xu, B. Zeng, T. Chilimbi, H. Zhao, Robust Multi-Task Learning
with Excess Risks, ICML 2024, arXiv:2402.02009.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _host, _present, _tree
from torchjd_func._lift import statistic_like
from torchjd_func._types import Aggregator, PyTree
from torchjd_func.aggregation import _rows

NAME = "excess_mtl"


class ExcessMTLState(NamedTuple):
    """Accumulated gradients, and what the excess risks are compared with."""

    roots: PyTree  # of sums of squares, like the Jacobian, in float32 or better
    log_weights: Tensor  # (m,) float64
    baseline: Tensor  # (m,) float64, excess risks of the warm-up; 0 where none was seen
    visits: Tensor  # (m,) int64, how often each objective was there


def _init(jac: PyTree, key: Tensor | None) -> ExcessMTLState:
    """Start from zero sums, uniform weights and no baseline."""
    leaf, m = _tree.leaves(jac)[0], _tree.leading_size(jac)
    return ExcessMTLState(
        _rows.zeros_like(jac),
        leaf.new_full((m,), -math.log(max(m, 1)), dtype=torch.float64),
        leaf.new_zeros((m,), dtype=torch.float64),
        leaf.new_zeros((m,), dtype=torch.int64),
    )


def _update(
    jac: PyTree,
    state: ExcessMTLState,
    losses: Tensor | None,
    *,
    robust_step_size: float | Tensor,
    n_warmup_steps: int | Tensor,
    eps: float | Tensor,
    present: Tensor | None = None,
) -> tuple[PyTree, ExcessMTLState]:
    """Measure the excess risks, and shift weight to the larger ones, relative to their baseline."""
    _check.state_type(NAME, state, ExcessMTLState)
    _rows.check(NAME, "roots", state.roots, jac)
    m = (_tree.leading_size(jac),)
    _check.state(NAME, "log_weights", state.log_weights, m)
    _check.state(NAME, "baseline", state.baseline, m)
    _check.state(NAME, "visits", state.visits, m)

    roots = _tree.map(_accumulate, state.roots, jac)
    excess = _excess(jac, roots, eps)
    # The first call always is a warm-up: nothing precedes it that it could be compared with.
    warm_up = (state.visits < n_warmup_steps) | (state.visits == 0)
    average = state.baseline + (excess - state.baseline) / (state.visits + 1)
    late = torch.where(state.baseline > 0, state.baseline, excess)
    baseline = torch.where(warm_up, average, late)

    relative = torch.where(baseline > 0, excess / torch.where(baseline > 0, baseline, 1.0), 0.0)
    moved = state.log_weights + torch.where(warm_up, 0.0, robust_step_size * relative)
    log_weights = torch.log_softmax(_present.only(present, moved, -torch.inf), dim=0)
    weights = log_weights.exp().to(statistic_like(jac).dtype)
    grads = _tree.weighted_sum(jac, weights)
    if present is not None:
        before = _present.only(present, state.log_weights, -torch.inf)
        log_weights = log_weights + torch.logsumexp(before, dim=0)
    after = ExcessMTLState(roots, log_weights, baseline, state.visits + 1)
    return grads, _present.renewed(present, after, state)


def _accumulate(roots: Tensor, leaf: Tensor) -> Tensor:
    """Add the squared entries of one leaf under the root, which neither over- nor underflows."""
    return _hypot(roots, _tree.real(leaf).to(roots.dtype))


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    """Return `sqrt(a^2 + b^2)`, with a derivative of 0 at 0."""
    if _host.unwatched(a, b):
        return torch.hypot(a, b)
    apart = (a != 0) | (b != 0)
    return torch.where(apart, torch.hypot(torch.where(apart, a, 1.0), b), 0.0)


def _excess(jac: PyTree, roots: PyTree, eps: float | Tensor) -> Tensor:
    """Return `E_i = sum_k J_ik^2 / sqrt(S_ik + eps)`, `(m,)`; the paper's equation 6."""
    pairs = zip(_tree.leaves(jac), _tree.leaves(roots), strict=True)
    rows = [(_tree.rows(leaf), _tree.rows(part)) for leaf, part in pairs]
    cut = [block for pair in rows for block in _rows.blocks(*pair)]
    return torch.stack([_excess_of_block(*block, eps=eps) for block in cut]).sum(dim=0)


def _excess_of_block(rows: Tensor, roots: Tensor, *, eps: float | Tensor) -> Tensor:
    """Return the share of some columns in `E`."""
    if isinstance(eps, Tensor) or eps > 0:
        roots = _hypot(roots, _host.number(eps, roots).sqrt())
    # Where nothing was seen the numerator is 0 as well.
    parts = rows / roots.clamp(min=torch.finfo(roots.dtype).tiny)
    return (parts * rows).sum(dim=1, dtype=torch.float64)


def excess_mtl(
    robust_step_size: float | Tensor = 1.0,
    n_warmup_steps: int | Tensor = 0,
    *,
    eps: float | Tensor = 0.0,
) -> Aggregator:
    r"""Weigh the gradients by how far each objective is from what it could still reach.

    $$\mathcal S \leftarrow \mathcal S + J^{\circ 2}, \qquad
    E_i = \sum_k \frac{J_{ik}^2}{\sqrt{\mathcal S_{ik}}}, \qquad
    w_i \propto w_i \exp\Big(\eta \frac{E_i}{E_i^0}\Big), \qquad d = J^\top w.$$

    Unlike the loss, the excess risk $E$ does not favour noisy tasks. The baseline $E^0$ is the
    average over the warm-up, at least the first call, during which the weights stay uniform. A
    task whose gradients were zero all that time gets its baseline at the first that is not. The
    state holds $\mathcal S$, of the size of the Jacobian. Weights sum to 1; the step may conflict
    with objectives.

    Args:
        robust_step_size: $\eta$; large values put all weight on one task.
        n_warmup_steps: Calls with an objective that only collect its baseline; the paper uses 3
            epochs. 0 is as 1.
        eps: Added to $\mathcal S$ under the root; the authors' code has 1e-7.

    Returns:
        The Aggregator, without weighting: the state has the size of the Jacobian.

    Raises:
        ValueError: If a number is out of range.

    Differs from other implementations:
        TorchJD without warm-up takes a step with the raw excess risks at the first call; the
        authors and this do not.
        TorchJD, LibMTL and the authors add 1e-7 under the root, TorchJD also to the baseline; here
        the scale of the gradients does not matter.
        The authors' code and LibMTL let weights sum to `m`.
        LibMTL divides by zero where a task starts with a zero gradient.

    References:
        Y. He et al., Robust Multi-Task Learning with Excess Risks, ICML 2024,
        https://arxiv.org/abs/2402.02009

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> _, state = jd.excess_mtl()(jac)
        >>> _, state = jd.excess_mtl()(jac * torch.tensor([[0.5], [1.5]]), state)
        >>> state.log_weights.exp()
        tensor([0.2642, 0.7358], dtype=torch.float64)
    """
    options = {
        "robust_step_size": _check.interval("robust_step_size", robust_step_size, 0),
        "n_warmup_steps": _check.interval("n_warmup_steps", n_warmup_steps, 0),
        "eps": _check.interval("eps", eps, 0),
    }
    return Aggregator(NAME, _init, partial(_update, **options))
