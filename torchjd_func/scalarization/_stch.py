"""STCH: smooth Tchebycheff scalarization.

X. Lin, X. Zhang, Z. Yang, F. Liu, Z. Wang, Q. Zhang, Smooth Tchebycheff Scalarization for
Multi-Objective Optimization, ICML 2024, arXiv:2402.19078.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchjd_func import _check
from torchjd_func._names import Vector
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import (
    Number,
    Numbers,
    count,
    entries,
    log_mean_exp,
    number,
    optional,
    pure,
    weights_or_uniform,
)

_EPS = 1e-20  # of the multi-task code: y = log(L / nadir + eps)


def _soft_maximum(values: Tensor, mu: Number, present: Tensor | None) -> Tensor:
    """Return `mu log sum exp(values / mu)`."""
    m, width = count(values, present), number(mu, values)
    mean = log_mean_exp(values, (1 / m).expand(values.shape), 1 / width, present)
    return mean + width * m.log()


def _stch(
    losses: Tensor,
    *,
    weights: Vector | None,
    reference: Vector | None,
    mu: Number,
    present: Tensor | None = None,
) -> Tensor:
    """Take the soft maximum of the weighted gaps."""
    gaps = losses - entries("reference", reference, losses, 0.0)
    return _soft_maximum(weights_or_uniform(weights, losses, present) * gaps, mu, present)


def _stch_nadir(
    losses: Tensor, *, nadir: Vector, mu: Number, present: Tensor | None = None
) -> Tensor:
    """Take the soft maximum of the logarithms of the losses relative to the nadir."""
    ratio = losses / entries("nadir", nadir, losses, 1.0)
    return count(losses, present) * _soft_maximum((ratio + _EPS).log(), mu, present)


def stch(
    mu: Number = 0.1,
    weights: Numbers | None = None,
    reference: Numbers | None = None,
    *,
    nadir: Numbers | None = None,
) -> Scalarizer:
    r"""Take a smooth maximum of the weighted distances from an ideal point.

    $$s = \mu \log \sum_i \exp \frac{w_i (L_i - z_i)}{\mu}, \qquad
    \frac{\partial s}{\partial L_i} = w_i \pi_i, \quad
    \pi = \mathrm{softmax}\Big(\frac{w \circ (L - z)}{\mu}\Big).$$

    Lies between Tchebycheff and Tchebycheff plus $\mu \log m$. With a nadir $\nu$ it is the form
    for multi-task learning, on $y_i = \log(L_i / \nu_i)$ and without weights:
    $s = m \mu \log \sum_i \exp(y_i / \mu)$, with $\mu = 1$ in the authors' code, which first trains
    4 epochs on `log_sum` and takes the average losses of the last of them as $\nu$.

    Args:
        mu: Positive; the smaller, the closer to the maximum. A tensor may be vmapped.
        weights: `w`, `(m,)`, positive; `1/m` by default. A tensor may be vmapped.
        reference: `z`, `(m,)`, the ideal point, below all losses; zeros by default.
        nadir: $\nu$, `(m,)`, positive; takes the place of `weights` and `reference`.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `mu` is not positive, if a vector is not of the number of objectives, or if
            `nadir` comes with weights or a reference.

    Differs from other implementations:
        TorchJD has no default of `mu`, and no nadir.
        LibMTL and the multi-task code do not add the detached maximum back: same gradient, another
        value.

    References:
        X. Lin, X. Zhang, Z. Yang, F. Liu, Z. Wang, Q. Zhang, Smooth Tchebycheff Scalarization for
        Multi-Objective Optimization, ICML 2024, https://arxiv.org/abs/2402.19078

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.stch(1.0, [0.25, 0.75])(torch.tensor([0.5, 3.0]))[0]
        tensor(2.3628)
    """
    _check.interval("mu", mu, 0, open_low=True)
    if nadir is None:
        vectors = {
            "weights": optional("weights", weights, low=0),
            "reference": optional("reference", reference),
        }
        return pure("stch", partial(_stch, mu=mu, **vectors))
    if weights is not None or reference is not None:
        raise ValueError(
            "`nadir` must come alone, got weights or a reference beside it. "
            "Drop them: the nadir scales each loss."
        )
    return pure("stch", partial(_stch_nadir, mu=mu, nadir=_check.per_loss("nadir", nadir, low=0)))
