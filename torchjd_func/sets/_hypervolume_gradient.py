"""Hypervolume gradient: each model gains volume for the set.

H. Wang, A. Deutz, T. Baeck, M. Emmerich, Hypervolume Indicator Gradient Ascent Multi-objective
Optimization, EMO 2017; T. M. Deist et al., Multi-Objective Learning to Predict Pareto Fronts Using
Hypervolume Maximization, 2021, arXiv:2102.04523.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _host
from torchjd_func._lift import no_state
from torchjd_func._types import State
from torchjd_func.linalg._gramian import ratio
from torchjd_func.sets._types import SetRule


def _update(
    gramians: Tensor,
    losses: Tensor,
    state: State,
    *,
    reference: Tensor,
    slack: float | Tensor | None,
    normalize: bool,
) -> tuple[Tensor, State]:
    """Weigh each loss by the facet that it moves."""
    _check.stateless("hypervolume_gradient", state)
    _check.length("reference", reference, losses.shape[1])
    corner = _host.to(reference, losses)
    sound = losses.isfinite().all(-1, keepdim=True)  # who diverged counts as outside
    if slack is not None:
        worst = torch.where(sound, losses, -torch.inf).amax(0)
        corner = torch.maximum(corner, worst + (slack - 1) * worst.abs())
    weights = facets(torch.where(sound, losses, corner.detach()), corner)
    if not normalize:
        return weights, state
    length = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
    return ratio(weights, length), state


def facets(losses: Tensor, corner: Tensor) -> Tensor:
    """Return minus the derivative of the volume of each front by its losses, `(k, m)`."""
    inside = ~(losses >= corner).any(-1)
    equal = (losses.unsqueeze(1) == losses).all(-1)
    rank = front_ranks(losses)
    rivals = (rank.unsqueeze(1) == rank) & inside & ~equal
    found = [_facet(losses, corner, rivals, axis) for axis in range(losses.shape[1])]
    return torch.where(inside.unsqueeze(-1), torch.stack(found, -1), 0.0)


def _facet(losses: Tensor, corner: Tensor, rivals: Tensor, axis: int) -> Tensor:
    """Return the area that each point sees along an axis past all points in front of it, `(k,)`.

    A tie hides too: there the two one-sided derivatives differ, and the smaller one is taken.
    """
    seen, room = _without(losses, axis), _without(corner - losses, axis)
    hides = rivals & (losses[:, axis] <= losses[:, axis, None])
    if losses.shape[1] == 1:
        return (~hides.any(-1)).to(losses)
    shadows = _without(corner, axis) - torch.maximum(seen, seen.unsqueeze(1))
    hidden = volume(torch.where(hides.unsqueeze(-1), shadows, 0.0))
    return (room.prod(-1) - hidden).clamp(min=0)


def _without(x: Tensor, axis: int) -> Tensor:
    """Leave out a number of the last dimension; a list of places would be copied to a device."""
    return torch.cat([x[..., :axis], x[..., axis + 1 :]], -1)


def front_ranks(losses: Tensor) -> Tensor:
    """Return the number of each point's front, `(k,)`: the longest chain of points above it."""
    k = losses.shape[0]
    better = (losses.unsqueeze(1) <= losses).all(-1) & (losses.unsqueeze(1) < losses).any(-1)
    rank = torch.zeros_like(better[0], dtype=torch.int64)
    for _ in range(k - 1):
        rank = torch.where(better, rank.unsqueeze(1) + 1, 0).amax(0)
    return rank


def volume(boxes: Tensor) -> Tensor:
    """Return the volume of unions of boxes `(..., k, d)`, each from 0 to a corner, exactly.

    Boxes are sliced along their last axis; a slice is a union in one dimension less, of the boxes
    that reach it. The cost is `k^(d-1)` numbers, from two dimensions on.
    """
    if boxes.shape[-1] == 1:
        return boxes[..., 0].amax(-1)
    order = boxes[..., -1].argsort(dim=-1, descending=True)
    boxes = boxes.gather(-2, order.unsqueeze(-1).expand(boxes.shape))
    height, base = boxes[..., -1], boxes[..., :-1]
    thickness = height - torch.cat([height[..., 1:], torch.zeros_like(height[..., :1])], -1)
    if base.shape[-1] == 1:
        return (thickness * base[..., 0].cummax(-1).values).sum(-1)
    k = boxes.shape[-2]
    reaching = torch.ones(k, k, dtype=torch.bool, device=boxes.device).tril().unsqueeze(-1)
    slices = volume(torch.where(reaching, base.unsqueeze(-3), 0.0))
    return (thickness * slices).sum(-1)


def hypervolume_gradient(
    reference: Tensor,
    *,
    slack: float | Tensor | None = 1.1,
    normalize: bool = True,
) -> SetRule:
    r"""Move a set of models so that the volume that their losses dominate grows fastest.

    $$d_i = J_i^\top \frac{\omega_i}{\lVert \omega_i \rVert}, \qquad
    \omega_{ik} = -\frac{\partial \, \mathrm{HV}}{\partial L_{ik}} \ge 0,$$

    the $(m-1)$-dimensional area of the facet that model `i` alone holds along axis `k`: for two
    losses, the steps to its neighbours on the front. Of dominated models HV is blind, so models are
    sorted into fronts, and each front has its own volume: all models move. Models of equal losses
    share a gradient. Models that are not below the reference in all losses get 0. Where two models
    tie in one loss only, the smaller of the one-sided derivatives is taken. Gramians are
    not used. Exact for any `m`; time and memory grow as $k^2$ up to three losses, then as
    $k^{m-1}$.

    Args:
        reference: `(m,)`, worse than losses of interest. A tensor may be vmapped.
        slack: $\delta > 1$: each entry of the reference is raised to at least $\delta$ times the
            worst loss of the set (for a negative one, as far above it). `None`: the reference
            stays as it is. A tensor may be vmapped.
        normalize: Whether weights have unit length, so that models of small facets move as well.

    Returns:
        The SetRule, without state.

    Raises:
        ValueError: If `slack` is not above 1, or the reference is not of the losses' size.

    References:
        H. Wang, A. Deutz, T. Baeck, M. Emmerich, Hypervolume Indicator Gradient Ascent
        Multi-objective Optimization, EMO 2017, https://doi.org/10.1007/978-3-319-54157-0_44.
        M. Emmerich, A. Deutz, Time complexity and zeros of the hypervolume indicator gradient
        field, EVOLVE 2014. T. M. Deist, M. Grewal, F. J. W. M. Dankers, T. Alderliesten,
        P. A. N. Bosman, Multi-Objective Learning to Predict Pareto Fronts Using Hypervolume
        Maximization, 2021, https://arxiv.org/abs/2102.04523

    Example:
        >>> import torch, torchjd_func as jd
        >>> losses = torch.tensor([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0]])
        >>> rule = jd.sets.hypervolume_gradient(torch.tensor([5.0, 5.0]), normalize=False)
        >>> rule.weighting(torch.zeros(3, 2, 2), losses=losses)[0]
        tensor([[1., 1.],
                [2., 2.],
                [1., 1.]])
    """
    _check.flag("normalize", normalize)
    corner = _check.vector("reference", reference)
    factor = _check.interval("slack", slack, 1, open_low=True, optional=True)
    update = partial(_update, reference=corner, slack=factor, normalize=normalize)
    return SetRule("hypervolume_gradient", no_state, update, needs="size")
