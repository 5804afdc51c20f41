"""MGDA: the multiple-gradient descent algorithm.

J.-A. Desideri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization,
C. R. Math. 350, 2012; row normalisations of O. Sener, V. Koltun, NeurIPS 2018, arXiv:1810.04650.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check, _present
from torchjd_func._lift import no_state, weighted
from torchjd_func._types import Aggregator, State, Weighting
from torchjd_func.aggregation._rows import safe_sqrt
from torchjd_func.linalg._nnqp import nearest, ridge_of

NORMALIZATIONS = (None, "l2", "loss", "loss+")


def _update(
    gramian: Tensor,
    state: State,
    losses: Tensor | None,
    *,
    normalization: str | None,
    apply_to: str,
    solver: str,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Find the min-norm point of the rows divided by `scale`."""
    _check.stateless("mgda", state)
    wide, ridge = gramian.double(), ridge_of(gramian)
    if normalization is None:
        return nearest(_present.apart(wide, present), ridge, solver).value, state
    scale = _row_scale(wide, losses, normalization)
    inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 1.0)
    normalized = _present.apart(wide * inverse.unsqueeze(-1) * inverse, present)
    weights = nearest(normalized, ridge, solver).value
    return (weights * inverse if apply_to == "normalized" else weights), state


def _row_scale(gramian: Tensor, losses: Tensor | None, normalization: str) -> Tensor:
    """Return what each row is divided by before the min-norm point is sought."""
    norms = safe_sqrt(gramian.diagonal())
    if normalization == "l2":
        return norms
    values = _check.losses_present(f"mgda(normalization={normalization!r})", losses)
    return values * norms if normalization == "loss+" else values


def mgda(
    normalization: str | None = None, *, apply_to: str = "raw", solver: str = "auto"
) -> Aggregator:
    r"""Step along the shortest convex combination of the gradients.

    $$d = J^\top w, \qquad w \in \arg\min_{w \in \Delta} w^\top G w.$$

    To first order every objective improves by at least $\lVert d \rVert^2$; `d` is zero where the
    point is Pareto stationary, hence also when any single gradient is zero. Solves one quadratic
    program in `m` unknowns, exactly.

    Args:
        normalization: Rows are divided by a scale before the weights are sought: `"l2"`, the norm;
            `"loss"`, the loss; `"loss+"`, their product; `None`, nothing. Where a scale is not
            positive the row is kept as it is. `"loss"` and `"loss+"` need `losses=`.
        apply_to: Whether the weights multiply the `"raw"` rows, as in the authors' code, or the
            `"normalized"` rows.
        solver: As for `jd.linalg.nnqp`.

    Returns:
        The Aggregator, without state.

    Raises:
        ValueError: If an option is unknown, or losses are needed and missing.

    Differs from other implementations:
        TorchJD iterates Frank-Wolfe to 1e-3, up to 6 % too long; the minimum is exact here.
        The authors' code and LibMTL clamp weights to 0.001 ... 0.999; here they reach 0 and 1.
        LibMTL applies the weights to the normalised rows (`apply_to="normalized"`).

    References:
        J.-A. Desideri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization,
        C. R. Math. 350, 2012, https://doi.org/10.1016/j.crma.2012.03.014. O. Sener, V. Koltun,
        Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018,
        https://arxiv.org/abs/1810.04650

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.mgda().weighting(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))[0]
        tensor([0.6000, 0.4000])
    """
    _check.choice("normalization", normalization, NORMALIZATIONS)
    _check.choice("apply_to", apply_to, ("raw", "normalized"))
    update = partial(
        _update, normalization=normalization, apply_to=apply_to, solver=_check.solver(solver)
    )
    return weighted(Weighting("mgda", no_state, update, widen=False))
