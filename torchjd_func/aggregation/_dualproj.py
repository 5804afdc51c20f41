"""DualProj: the mean gradient, projected on the cone that conflicts with no gradient.

P. Quinton, V. Rey, Jacobian Descent for Multi-Objective Optimization, arXiv:2406.16232.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchjd_func import _check
from torchjd_func._lift import stateless, weighted
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator
from torchjd_func.aggregation._preference import resolve
from torchjd_func.linalg import dual_cone_projection


def _weights(
    gramian: Tensor, *, preference: Vector | None, solver: str, present: Tensor | None = None
) -> Tensor:
    """Project the preferred combination on the dual cone; a row of zeros is never in the way."""
    wanted = resolve(preference, gramian.double(), present)
    return dual_cone_projection(gramian, wanted, solver=solver).value


def dualproj(preference: Numbers | None = None, *, solver: str = "auto") -> Aggregator:
    r"""Project the mean gradient on the cone of directions that conflict with none.

    $$d = J^\top \arg\min_{v \ge b} v^\top G v.$$

    To first order no objective gets worse ($J d \ge 0$). Where the mean does not conflict it is the
    mean. Solves one quadratic program in `m` unknowns, exactly.

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
        TorchJD adds 1e-4 to the normalised Gramian, so that its result may conflict slightly.
        Gradient Episodic Memory projects on the cone of memory gradients, and adds a margin.

    References:
        P. Quinton, V. Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
        https://arxiv.org/abs/2406.16232. Idea: D. Lopez-Paz, M. Ranzato, Gradient Episodic Memory
        for Continual Learning, NeurIPS 2017, https://arxiv.org/abs/1706.08840

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.dualproj()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))[0]
        tensor([0.5556, 1.1111, 1.1111])
    """
    options = {"preference": _check.preference(preference), "solver": _check.solver(solver)}
    return weighted(stateless("dualproj", partial(_weights, **options), widen=False))
