"""UPGrad: unconflicting projection of gradients.

P. Quinton, V. Rey, Jacobian Descent for Multi-Objective Optimization, arXiv:2406.16232.
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
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg._nnqp import ridge_of, solve


def _weights(
    gramian: Tensor, *, preference: Vector | None, solver: str, present: Tensor | None = None
) -> Tensor:
    """Average `v = e_i + z`; row `i` of the multipliers is `z`, for `q = G e_i`."""
    # A row of zeros is never in the way, and its own projection has the weight 0.
    wide = gramian.double()
    shares = resolve(preference, wide, present)
    multipliers = solve(wide, wide, ridge_of(gramian), solver).value
    return torch.addmv(shares, multipliers.mT, shares)


def upgrad(preference: Numbers | None = None, *, solver: str = "auto") -> Aggregator:
    r"""Average the gradients after projecting each on the cone that conflicts with none.

    $$d = \sum_i b_i\, \pi_J(g_i), \qquad
    \pi_J(J^\top u) = J^\top \arg\min_{v \ge u} v^\top G v.$$

    To first order no objective gets worse ($J d \ge 0$), the result is linear in the scale of each
    gradient, and it is a combination of the gradients. Where nothing conflicts it is the mean.
    Solves `m` quadratic programs in `m` unknowns, exactly.

    Args:
        preference: `b`, `(m,)`, a tensor or list in the order of the losses (of a dict: of their
            sorted names), or a dict by these names; positive, uniform weights `1/m` by default. A
            tensor may be vmapped or changed without recompiling.
        solver: As for `jd.linalg.nnqp`.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If `preference` is not 1-D, not of the number of objectives, or negative.

    Differs from other implementations:
        TorchJD and LibMTL add 1e-4 to the normalised Gramian: about 3e-4 relative difference, and
        conflict with rows whose squared norm is below 1e-4 of the total. Nothing is added here.
        They treat Gramians of trace below 1e-4 as zero; here the scale does not matter.

    References:
        P. Quinton, V. Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
        https://arxiv.org/abs/2406.16232

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.upgrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.2924, 1.9006, 1.9006])
    """
    options = {"preference": _check.preference(preference), "solver": _check.solver(solver)}
    return weighted(stateless("upgrad", partial(_weights, **options), widen=False))
