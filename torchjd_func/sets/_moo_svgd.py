"""MOO-SVGD: particles that go down together and keep apart in the space of losses.

X. Liu, X. Tong, Q. Liu, Profiling Pareto Front With Multi-Objective Stein Variational Gradient
Descent, NeurIPS 2021.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._lift import no_state
from torchjd_func._types import State
from torchjd_func.linalg import min_norm_point
from torchjd_func.sets._types import SetRule


def _update(
    gramians: Tensor, losses: Tensor, state: State, *, bandwidth: float | Tensor | None
) -> tuple[Tensor, State]:
    """Share the min-norm directions, and repel."""
    _check.stateless("moo_svgd", state)
    k = losses.shape[0]
    gaps = losses.unsqueeze(1) - losses  # (k, k, m)
    squares = gaps.square().sum(-1)
    h = median_bandwidth(squares) if bandwidth is None else bandwidth * squares.new_ones(())
    kernel, slope = _kernel(squares, h)
    repulsion = (slope.unsqueeze(-1) * gaps).sum(1)
    down = min_norm_point(gramians).value
    own = torch.eye(k, dtype=losses.dtype, device=losses.device).unsqueeze(-1)
    return (kernel.unsqueeze(-1) * down + own * repulsion.unsqueeze(1)) / k, state


def _kernel(squares: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return `exp(-squares / h)` and the factor of `L_i - L_j` in its gradient, or their limits.

    Both limits for `h -> 0` are finite: the identity, and no repulsion.
    """
    wide = ~(h <= 0)  # not-a-number spreads
    inverse = 1 / torch.where(wide, h, 1.0)
    near = torch.where(wide, (-squares * inverse).exp(), (squares == 0).to(squares))
    return near, torch.where(wide, -2 * inverse * near, 0.0)


def median_bandwidth(squares: Tensor) -> Tensor:
    """Return the median of `(k, k)` squared distances, of its own too, over `log k`; 0 if k = 1."""
    k = squares.shape[-1]
    ordered = squares.flatten().sort().values
    middle = (ordered[(k * k - 1) // 2] + ordered[k * k // 2]) / 2
    return middle / math.log(k) if k > 1 else 0 * middle


def moo_svgd(bandwidth: float | Tensor | None = None) -> SetRule:
    r"""Move a set of models to the Pareto front, and along it away from one another.

    $$d_i = \frac1k \Big(\sum_j \kappa_{ij} \, g^*_j + \nabla_{\theta_i} \sum_j \kappa_{ij}\Big)
    = \frac1k \Big(\sum_j \kappa_{ij} J_j^\top w_j -
    \frac2h J_i^\top \sum_j \kappa_{ij} (L_i - L_j)\Big),
    \qquad \kappa_{ij} = e^{-\lVert L_i - L_j \rVert^2 / h},$$

    with $g^*_j = J_j^\top w_j$ the shortest convex combination of the gradients of model `j`
    (`jd.mgda`). A model shares the descent of those with similar losses, and is repelled by them in
    the space of losses. The gradients of one model move another: the models must have parameters of
    the same shapes. Weights are `(k, k, m)`. A single model follows `jd.mgda`; models of
    equal losses do not repel.

    Args:
        bandwidth: `h`, positive, in squared units of the losses; by default the median of
            $\lVert L_i - L_j \rVert^2$ over all pairs, `i = j` too, divided by $\log k$. A tensor
            may be vmapped.

    Returns:
        The SetRule, without state.

    Raises:
        ValueError: If `bandwidth` is not positive.

    Differs from other implementations:
        The authors' code multiplies by the bandwidth, so that its kernel is almost the identity.
        Their code normalises gradients along the axis of the models; here they are not normalised.
        libmoon weighs the gradients of a model itself by the weights of its neighbours.

    References:
        X. Liu, X. Tong, Q. Liu, Profiling Pareto Front With Multi-Objective Stein Variational
        Gradient Descent, NeurIPS 2021,
        https://proceedings.neurips.cc/paper/2021/hash/7bb16972da003e87724f048d76b7e0e1-Abstract.html

    Example:
        >>> import torch, torchjd_func as jd
        >>> points = torch.tensor([[0.0, 1.0], [0.5, 0.5], [-0.5, 1.0]])
        >>> targets = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fn = lambda x: (x - targets).square().sum(1)
        >>> jacs, losses = torch.func.vmap(jd.jac_and_value(fn))(points)
        >>> jd.sets.moo_svgd(bandwidth=2.0)(jacs, losses=losses)[0]
        tensor([[-0.0788,  0.9168],
                [-0.3091,  0.6320],
                [ 0.5514,  0.7749]])
    """
    h = _check.interval("bandwidth", bandwidth, 0, open_low=True, optional=True)
    return SetRule("moo_svgd", no_state, partial(_update, bandwidth=h))
