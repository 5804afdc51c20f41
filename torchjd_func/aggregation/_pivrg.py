"""PIVRG: fair progress, with more for the tasks that are behind.

X. Qin, X. Wang, J. Yan, Revisiting Fairness in Multitask Learning: A Performance-Driven Approach
for Variance Reduction, CVPR 2025.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _names, _present
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator
from torchjd_func.linalg import orthant_root


def _weights(
    gramian: Tensor,
    *,
    scores: Vector,
    bound: float,
    min_temperature: float | Tensor,
    alpha: float | Tensor,
    max_iter: int,
    present: Tensor | None = None,
) -> Tensor:
    """Bargain with powers that grow with the scores."""
    wide, eps = gramian.to(torch.float64), torch.finfo(gramian.dtype).eps
    powers = _powers(_names.entries("scores", scores, wide), bound, min_temperature, present)
    return orthant_root(wide, alpha, preference=powers, max_iter=max_iter, eps=eps).value


def _powers(
    scores: Tensor, bound: float, min_temperature: float | Tensor, present: Tensor | None
) -> Tensor:
    """Return `m softmax(scores / temperature)`, 1 where absent."""
    highest = _present.only(present, scores, -torch.inf)
    spread = highest.amax() - _present.only(present, scores, torch.inf).amin()
    temperature = (spread / math.log(bound)).clamp(min=min_temperature)
    shares = torch.softmax(highest / temperature, dim=0)
    return _present.only(present, _present.count(present, scores) * shares, 1.0)


def pivrg(
    scores: Numbers,
    *,
    bound: float = 2.0,
    min_temperature: float | Tensor = 10.0,
    alpha: float | Tensor = 2.0,
    max_iter: int = 40,
) -> Aggregator:
    r"""Share the progress fairly, and more of it with the tasks that perform worst.

    $$d = J^\top w, \qquad (G w)_i = (p_i / w_i)^{1/\alpha}, \qquad
    p = m \operatorname{softmax}(s / \tau), \quad
    \tau = \max\bigl(\tau_0, \tfrac{\max s - \min s}{\log \beta}\bigr).$$

    FairGrad with a preference that is made of measured performance, so that the performance of the
    tasks varies less. No power is more than `bound` times another. Every objective improves. Where
    the gradients are Pareto stationary `d` is zero.

    Args:
        scores: `s`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their sorted
            names), or a dict by these names: how far each task is behind its baseline, the larger
            the worse; the authors take percent, `100 * jd.metrics.delta_m` of the task's metrics,
            after each epoch. A tensor may be vmapped or changed without recompiling.
        bound: `beta`, above 1.
        min_temperature: `tau_0`, positive, in the unit of the scores; scores that differ by less
            than `tau_0 log(beta)` make less of a difference than `bound`.
        alpha: As for `jd.fairgrad`.
        max_iter: As for `jd.fairgrad`.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `bound` is not above 1, or `min_temperature` or `alpha` is not positive.

    Differs from other implementations:
        The authors minimise squared residuals from uniform weights; solved exactly here.
        They multiply `d` by `m` and clip its length to 1.

    References:
        X. Qin, X. Wang, J. Yan, Revisiting Fairness in Multitask Learning: A Performance-Driven
        Approach for Variance Reduction, CVPR 2025,
        https://openaccess.thecvf.com/content/CVPR2025/papers/Qin_Revisiting_Fairness_in_Multitask_Learning_A_Performance-Driven_Approach_for_Variance_CVPR_2025_paper.pdf

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.pivrg([0.0, 20.0])
        >>> rule(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.0839, 0.7728, 0.7728])
    """
    _check.interval("bound", bound, 1, open_low=True, plain=True)
    _check.interval("alpha", alpha, 0, open_low=True)
    options = {
        "scores": _check.per_loss("scores", scores),
        "bound": bound,
        "min_temperature": _check.interval("min_temperature", min_temperature, 0, open_low=True),
        "alpha": alpha,
        "max_iter": _check.integer("max_iter", max_iter),
    }
    return weighted(stateless("pivrg", partial(_weights, **options), widen=False))
