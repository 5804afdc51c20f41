"""FairGrad: alpha-fair allocation of the update among the objectives.

H. Ban, K. Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv:2402.15638.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator
from torchjd_func.linalg import orthant_root


def _weights(
    gramian: Tensor, *, alpha: float | Tensor, max_iter: int, present: Tensor | None = None
) -> Tensor:
    """Solve `G w = w^(-1/alpha)` (equation 4); rows of zeros take no part."""
    wide, eps = gramian.to(torch.float64), torch.finfo(gramian.dtype).eps
    return orthant_root(wide, alpha, max_iter=max_iter, eps=eps).value


def fairgrad(alpha: float | Tensor = 1.0, *, max_iter: int = 40) -> Aggregator:
    r"""Share the progress fairly: the larger `alpha`, the more it goes to who gains least.

    $$d = J^\top w, \qquad w > 0, \qquad (G w)_i = w_i^{-1/\alpha}.$$

    $d$ maximises $\sum_i (g_i^\top d)^{1 - \alpha} / (1 - \alpha)$ among the vectors of its length.
    Every objective improves: $g_i^\top d = w_i^{-1/\alpha} > 0$. `alpha = 1` is Nash-MTL, small
    values approach the sum of the gradients, large ones max-min fairness. Zero gradients are left
    out. Where the others are Pareto stationary there is no solution, and `d` is zero. Solved by
    Newton's method in `m` unknowns, exactly unless `alpha` and the lengths of the gradients are
    extreme (5 and twelve decades, say), when more steps are needed.

    Args:
        alpha: Positive; a 0-d tensor may be vmapped or changed without recompiling.
        max_iter: Largest number of Newton steps.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `alpha` is a number that is not positive.

    Differs from other implementations:
        TorchJD and LibMTL minimise squared residuals, which returns huge weights where there is no
        solution; `d` is zero here.
        TorchJD maps `alpha = 0` to the mean; the limit of the equation is the sum.
        The authors' code clips the length of `d` to 1 and multiplies it by the number of
        objectives.

    References:
        H. Ban, K. Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024,
        https://arxiv.org/abs/2402.15638

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.fairgrad(2.0)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.0313, 0.7908, 0.7908])
    """
    _check.interval("alpha", alpha, 0, open_low=True)
    _check.integer("max_iter", max_iter)
    weights_fn = partial(_weights, alpha=alpha, max_iter=max_iter)
    return weighted(stateless("fairgrad", weights_fn, widen=False))
