"""What can be seen of one aggregation: pure functions of a `jd.Observation`, for `jd.monitored`.

All are computed from Gramian and weights, in float64, and cost nothing next to a backward pass. Any
other function of an `Observation` will do as well, a lambda for instance; options are bound by
`functools.partial`. `d` stands for the update, and row i of `J` for the gradient of objective i.
All are those of the present objectives alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _check, _host, _observed, metrics
from torchjd_func._present import only
from torchjd_func._types import Observation
from torchjd_func.linalg._eigh import eigenvalues
from torchjd_func.linalg._gramian import rank_tol, ratio

__all__ = [
    "condition_number",
    "conflict_fraction",
    "cosine_to_mean",
    "dual_cone_residual",
    "entropy",
    "min_cosine",
    "min_norm_residual",
    "pairwise_cosine",
    "row_norms",
    "stationarity_gap",
    "weights",
]


def weights(observation: Observation) -> Tensor:
    """Return the weights of the objectives.

    Args:
        observation: Of a rule with weights.

    Returns:
        `(m,)`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mgda(), {"weights": jd.measures.weights})
        >>> _, state = rule(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> jd.read_measures(state)["weights"]
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    return _observed.weights(observation)


def cosine_to_mean(observation: Observation) -> Tensor:
    """Return the cosine between the update and the mean gradient: 1 if nothing was changed.

    Args:
        observation: Of any rule that sees gradients.

    Returns:
        `()`; 0 if either is zero.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mgda(), {"cosine": jd.measures.cosine_to_mean})
        >>> _, state = rule(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> jd.read_measures(state)["cosine"]
        tensor(0.9600, dtype=torch.float64)
    """
    inner, length = _observed.update(observation)
    return ratio(inner.mean(), length * _observed.gramian(observation).mean().clamp(min=0).sqrt())


def min_cosine(observation: Observation) -> Tensor:
    """Return the lowest cosine between the update and a gradient: below 0 if one is worsened.

    Args:
        observation: Of any rule that sees gradients.

    Returns:
        `()`; the cosine to a zero gradient, or of a zero update, is 0.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"lowest": jd.measures.min_cosine})
        >>> _, state = rule(torch.tensor([[-3.0, 0.0], [6.0, 4.0]]))
        >>> jd.read_measures(state)["lowest"]
        tensor(-0.6000, dtype=torch.float64)
    """
    inner, length = _observed.update(observation)
    cosines = ratio(inner, length * _observed.row_norms(observation))
    return only(observation.present, cosines, torch.inf).min()


def pairwise_cosine(observation: Observation) -> Tensor:
    """Return the cosines between the gradients.

    Args:
        observation: Of any rule that sees gradients.

    Returns:
        `(m, m)`; those of a zero gradient are 0.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"cosines": jd.measures.pairwise_cosine})
        >>> _, state = rule(torch.tensor([[1.0, 0.0], [-3.0, 4.0]]))
        >>> jd.read_measures(state)["cosines"][0]
        tensor([ 1.0000, -0.6000], dtype=torch.float64)
    """
    return metrics.pairwise_cosine(_observed.gramian(observation))


def conflict_fraction(observation: Observation) -> Tensor:
    """Return the share of pairs of gradients whose inner product is negative.

    Args:
        observation: Of any rule that sees gradients.

    Returns:
        `()`, between 0 and 1; 0 for a single objective.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"conflicts": jd.measures.conflict_fraction})
        >>> _, state = rule(torch.tensor([[1.0, 0.0], [-3.0, 4.0], [0.0, 1.0]]))
        >>> jd.read_measures(state)["conflicts"]
        tensor(0.3333, dtype=torch.float64)
    """
    gramian = _observed.gramian(observation)
    m = _observed.count(observation)
    conflicts = torch.where(gramian.isnan(), gramian, gramian < 0)
    return conflicts.sum() / (m * (m - 1)).clamp(min=1)


def row_norms(observation: Observation) -> Tensor:
    """Return the lengths of the gradients.

    Args:
        observation: Of any rule that sees gradients.

    Returns:
        `(m,)`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"norms": jd.measures.row_norms})
        >>> _, state = rule(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> jd.read_measures(state)["norms"]
        tensor([5., 2.], dtype=torch.float64)
    """
    return _observed.row_norms(observation)


def entropy(observation: Observation) -> Tensor:
    """Return the entropy of the weights, in nats: 0 if one objective decides alone.

    Weights enter by their share of the sum of absolute weights, so it is at most `log(m)`.

    Args:
        observation: Of a rule with weights.

    Returns:
        `()`; 0 if all weights are 0.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"entropy": jd.measures.entropy})
        >>> _, state = rule(torch.eye(2))
        >>> jd.read_measures(state)["entropy"]
        tensor(0.6931, dtype=torch.float64)
    """
    sizes = _observed.weights(observation).abs()
    return torch.special.entr(ratio(sizes, sizes.sum())).sum()


def condition_number(observation: Observation) -> Tensor:
    """Return the ratio of the largest to the smallest positive singular value of the Jacobian.

    Args:
        observation: Of any rule that sees gradients.

    Returns:
        `()`, at least 1; 0 if all gradients are zero. Singular values that are rounding, in the
        dtype of the Gramian, count as 0.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"condition": jd.measures.condition_number})
        >>> _, state = rule(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> jd.read_measures(state)["condition"]
        tensor(3., dtype=torch.float64)
    """
    exact = _check.observed("gramian", observation.gramian)
    gramian = exact.to(torch.float64)
    values = eigenvalues(gramian)
    largest = values[-1]
    counted = values > rank_tol(exact) * largest
    smallest = torch.where(counted, values, largest).min()
    return ratio(largest, smallest.clamp(min=0)).sqrt()


def stationarity_gap(observation: Observation, *, relative: bool = False) -> Tensor:
    """Return how far the gradients are from cancelling: see `jd.metrics.stationarity_gap`.

    Args:
        observation: Of any rule that sees gradients.
        relative: Whether to divide by the length of the longest gradient.

    Returns:
        `()`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"gap": jd.measures.stationarity_gap})
        >>> _, state = rule(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> jd.read_measures(state)["gap"]
        tensor(2.4000, dtype=torch.float64)
    """
    gramian, present = _observed.gramian(observation), observation.present
    if present is not None:
        places = torch.arange(gramian.shape[0], device=gramian.device)
        # A present gradient once more, in the place of an absent one, leaves the convex hull.
        places = torch.where(present, places, present.int().argmax())
        gramian = gramian[places][:, places]
    return metrics.stationarity_gap(gramian, relative=relative)


def dual_cone_residual(
    observation: Observation, *, preference: Tensor | None = None, complementary: bool = True
) -> Tensor:
    r"""Return how far the weights are from solving a projection onto the dual cone.

    A projection is solved if and only if $z = w - u \ge 0$, $y = G w \ge 0$ and $z^\top y = 0$. In
    units of gradients, with the norms $\delta$ of the rows, the residual is

    $$\max_i \bigl|\min(\delta_i z_i, y_i / \delta_i)\bigr| \, / \, \max_i |\delta_i u_i|,$$

    which is rounding if the solver converged, whatever solver it was: it is judged by its answer.
    Meant for `jd.dualproj`. The weights of `jd.upgrad` are a sum over several projections, for
    which `complementary=False` leaves out the last condition: its residual of 0 is then necessary
    for convergence, and not sufficient.

    Args:
        observation: Of a rule with weights.
        preference: `(m,)`, the $u$ of the rule; by default `1 / m` each.
        complementary: Whether one of $z_i$ and $y_i$ has to be 0.

    Returns:
        `()`, 0 if solved.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.dualproj(), {"residual": jd.measures.dual_cone_residual})
        >>> _, state = rule(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        >>> jd.read_measures(state)["residual"] < 1e-12
        tensor(True)
    """
    gramian, norms = _observed.gramian(observation), _observed.row_norms(observation)
    weights = _observed.weights(observation)
    start = (1 / _observed.count(observation)).expand(weights.shape)
    start = start if preference is None else _host.to(preference, start)
    slack, product = (weights - start) * norms, ratio(gramian @ weights, norms)
    least = torch.minimum(slack, product)
    residual = least.abs() if complementary else (-least).clamp(min=0)
    return ratio(residual.max(), (norms * start).abs().max())


def min_norm_residual(observation: Observation) -> Tensor:
    r"""Return how far the weights are from those of the shortest convex combination.

    $$\bigl(w^\top G w - \min_i (G w)_i\bigr) / \max_i G_{ii},$$

    the duality gap of the min-norm problem, over the scale of the gradients: an upper bound on how
    much shorter (squared, relative) the combination could have been. Meant for `jd.mgda`; the
    solver is judged by its answer, provided that the weights are on the simplex.

    Args:
        observation: Of a rule with weights.

    Returns:
        `()`, 0 if solved.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.monitored(jd.mean(), {"residual": jd.measures.min_norm_residual})
        >>> _, state = rule(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> jd.read_measures(state)["residual"]
        tensor(0.1094, dtype=torch.float64)
    """
    gramian, weights = _observed.gramian(observation), _observed.weights(observation)
    inner = gramian @ weights
    least = only(observation.present, inner, torch.inf).min()
    return ratio(weights @ inner - least, gramian.diagonal().max())
