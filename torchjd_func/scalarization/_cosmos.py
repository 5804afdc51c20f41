"""COSMOS: a linear scalarization that rewards alignment with the preference.

M. Ruchte, J. Grabocka, Scalable Pareto Front Approximation for Deep Multi-Objective Learning,
ICDM 2021, arXiv:2103.13392.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchjd_func import _check
from torchjd_func._names import Vector
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.scalarization._common import Number, Numbers, entries, number, pure


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of two vectors; 0 if one is zero."""
    return (_unit(a) * _unit(b)).sum()


def _unit(vector: Tensor) -> Tensor:
    """Return the vector over its norm, free of underflow; zero if it is zero."""
    largest = vector.detach().abs().amax()
    defined = largest > 0
    scaled = torch.where(defined, vector / torch.where(defined, largest, 1.0), 0.0)
    return scaled / torch.where(defined, vector_norm(scaled), 1.0)


def _cosmos(
    losses: Tensor, *, weights: Vector, lambda_: Number, present: Tensor | None = None
) -> Tensor:
    """Subtract the rewarded cosine from the weighted sum."""
    r, losses = only(present, entries("weights", weights, losses, 1.0)), only(present, losses)
    return (r * losses).sum() - number(lambda_, losses) * _cosine(r, losses)


def cosmos(weights: Numbers, lambda_: Number) -> Scalarizer:
    r"""Combine the losses linearly, and reward a loss vector that points along the preference.

    $$s = r^\top L - \lambda \cos(r, L), \qquad \frac{\partial s}{\partial L} = r - \lambda
    \Big(\frac{r}{\lVert r\rVert \lVert L\rVert} -
    \frac{(r^\top L) L}{\lVert r\rVert \lVert L\rVert^3}\Big).$$

    The method draws `r` from a Dirichlet distribution for every batch and also feeds it to the
    model. $\lambda$ has the unit of a loss; weights of the gradients may be negative, and
    minimisers need not be Pareto optimal. At `L = 0` the cosine is 0.

    Args:
        weights: `r`, `(m,)`; a tensor may be vmapped or changed without recompiling.
        lambda_: At least 0; the paper has 0.01 to 8. A tensor may be vmapped.

    Returns:
        The Scalarizer, without state.

    Raises:
        ValueError: If `weights` is not of the number of objectives, or `lambda_` is negative.

    Differs from other implementations:
        libmoon divides `r` by its norm in the linear term too.
        The official code drops a first loss that equals zero from the linear term.

    References:
        M. Ruchte, J. Grabocka, Scalable Pareto Front Approximation for Deep Multi-Objective
        Learning, ICDM 2021, https://arxiv.org/abs/2103.13392

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.cosmos([0.25, 0.75], 1.0)(torch.tensor([0.5, 3.0]))[0]
        tensor(1.3872)
    """
    options = {
        "weights": _check.per_loss("weights", weights, low=0),
        "lambda_": _check.interval("lambda_", lambda_, 0),
    }
    return pure("cosmos", partial(_cosmos, **options))
