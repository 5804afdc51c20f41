"""FairGrad: alpha-fair allocation of the update among the objectives.

H. Ban, K. Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv:2402.15638.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator
from torchjd_func.aggregation._preference import shares_of
from torchjd_func.linalg import orthant_root


def _weights(
    gramian: Tensor,
    *,
    alpha: float | Tensor,
    preference: Vector | None,
    max_iter: int,
    present: Tensor | None = None,
) -> Tensor:
    """Solve `G w = (p / w)^(1/alpha)` (equation 4, for `p = 1`); rows of zeros take no part."""
    wide, eps = gramian.to(torch.float64), torch.finfo(gramian.dtype).eps
    shares = shares_of(preference, wide, present)
    return orthant_root(wide, alpha, preference=shares, max_iter=max_iter, eps=eps).value


def fairgrad(
    alpha: float | Tensor = 1.0, *, preference: Numbers | None = None, max_iter: int = 40
) -> Aggregator:
    r"""Share the progress fairly: the larger `alpha`, the more it goes to who gains least.

    $$d = J^\top w, \qquad w > 0, \qquad (G w)_i = (p_i / w_i)^{1/\alpha}.$$

    $d$ maximises $\sum_i p_i (g_i^\top d)^{1 - \alpha} / (1 - \alpha)$ among the vectors of its
    length. Every objective improves: $g_i^\top d > 0$. `alpha = 1` is Nash-MTL, small values
    approach the sum of the gradients, large ones max-min fairness. Zero gradients are left out.
    Where the others are Pareto stationary there is no solution, and `d` is zero. Solved by
    Newton's method in `m` unknowns, exactly. Where `alpha` and the lengths of the gradients are
    extreme (5 and 24 decades, say) that may take more than `max_iter` steps, and `d` is
    not-a-number.

    Args:
        alpha: Positive; a 0-d tensor may be vmapped or changed without recompiling.
        preference: `p`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; positive, 1 for each by default. The larger,
            the more an objective gains. A tensor may be vmapped.
        max_iter: Largest number of Newton steps.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `alpha` or a number in `preference` is not positive.

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
    shares = _check.shares(preference)
    weights_fn = partial(_weights, alpha=alpha, preference=shares, max_iter=max_iter)
    return weighted(stateless("fairgrad", weights_fn, widen=False))
