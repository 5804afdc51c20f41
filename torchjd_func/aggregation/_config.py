"""ConFIG: the conflict-free inverse of gradients.

Q. Liu, M. Chu, N. Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural
Networks, ICLR 2025, arXiv:2408.11104.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg._gramian import pseudo_inverse, rank_tol, rows_of

LENGTHS = ("projection", "min", "max", "arithmetic", "geometric", "harmonic")


def _weights(
    gramian: Tensor,
    *,
    preference: Vector | None,
    length: str,
    rtol: float | None,
    present: Tensor | None = None,
) -> Tensor:
    """Return the weights of the unit direction, times the length."""
    rows = rows_of(gramian.double())
    wanted = torch.where(rows.norms > 0, resolve(preference, rows.norms, present), 0.0)
    inverse = pseudo_inverse(rows.cosines, rank_tol(gramian, rtol))
    solved = inverse @ wanted
    along = rows.cosines @ solved
    square = solved @ along
    fixed = (x.detach() for x in (rows.cosines, inverse, solved, wanted - along, wanted))
    eps = len(gramian) * torch.finfo(gramian.dtype).eps
    defined = square.detach() > _rounding(*fixed) * eps**2
    scale = torch.where(defined, torch.where(defined, square, 1.0).rsqrt(), 0.0)
    return _length(rows.norms, along * scale, length, present) * solved * scale * rows.inverse


def _rounding(
    cosines: Tensor, inverse: Tensor, solved: Tensor, beyond: Tensor, wanted: Tensor
) -> Tensor:
    """Return the squared length of `U'C^+ b` that a rounding of `C` and `b` by 1 may give.

    A change `E` of `C` at a fixed rank changes it by `U'C^+ E C^+ b + U'(C^+)^2 E n`, with `n` the
    part of `b` beyond the range (G. H. Golub, V. Pereyra, 1973).
    """
    beyond = beyond - cosines @ (inverse @ beyond)  # the first time leaves rounding
    blown = inverse.diagonal().sum()
    spread = torch.stack([wanted, solved, blown * beyond])
    return blown * spread.square().sum()


def _length(norms: Tensor, cosines: Tensor, length: str, present: Tensor | None) -> Tensor:
    """Return the length `()`, given the cosine of the direction with each gradient."""
    if length == "projection":
        return norms @ cosines
    return _common_norm(norms, length, present) * torch.where(norms > 0, cosines, 0.0).sum()


def _common_norm(norms: Tensor, length: str, present: Tensor | None) -> Tensor:
    """Return the one norm `()` that stands for all."""
    if length == "min":
        return _present.only(present, norms, torch.inf).amin()
    if length == "max":
        return norms.amax()
    if length == "arithmetic":
        return _present.mean(present, norms)
    safe, mean = torch.where(norms > 0, norms, 1.0), partial(_present.mean, present)
    middle = mean(safe.log()).exp() if length == "geometric" else 1 / mean(1 / safe)
    return torch.where((_present.only(present, norms, 1.0) > 0).all(), middle, 0.0)


def config(
    preference: Numbers | None = None,
    *,
    length: str = "projection",
    rtol: float | None = None,
) -> Aggregator:
    r"""Step in the direction of the same angle with all gradients.

    With unit rows $U$ and $\hat x$ the direction of $U^\dagger b$,
    $$d = \Big( \sum_i g_i^\top \hat x \Big) \hat x.$$

    For independent gradients the cosines with `d` are proportional to `b`, so nothing conflicts,
    and the result is linear in the scale of each gradient. For dependent gradients, as with more
    objectives than parameters, it may conflict. Zero where $U^\dagger b$ is zero up to rounding.
    One pseudo-inverse of an `(m, m)` matrix.

    Args:
        preference: `b`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; positive, of any sum; equal angles by default.
            A tensor may be vmapped or changed without recompiling.
        length: `"projection"` as above, or a mean (`"arithmetic"`, `"geometric"`, `"harmonic"`) or
            an extreme (`"min"`, `"max"`) that replaces the norm of every $g_i$ in the sum.
        rtol: Share of the largest eigenvalue below which an eigenvalue of $U U^\top$ is taken as
            0; by default `m` times the rounding of the Gramian.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `length` is unknown, `rtol` is negative, or `preference` is not 1-D, not of
            the number of objectives, or negative.

    Differs from other implementations:
        The authors' form for two gradients is not a number where they are parallel or zero.
        TorchJD and the authors scale rounding to a direction where opposite gradients cancel.

    References:
        Q. Liu, M. Chu, N. Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed
        Neural Networks, ICLR 2025, https://arxiv.org/abs/2408.11104

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.config()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.1588, 2.0706, 2.0706])
    """
    _check.choice("length", length, LENGTHS)
    options = {
        "preference": _check.preference(preference),
        "length": length,
        "rtol": _check.interval("rtol", rtol, 0, 1, optional=True, plain=True),
    }
    return weighted(stateless("config", partial(_weights, **options), widen=False))
