"""What results are compared by: relative performance, ranks, volumes, conflicts of gradients.

Signs: `delta_m` is a drop (lower is better), `delta_p` an improvement (higher is better).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.linalg import min_norm_point
from torchjd_func.linalg._gramian import ratio

__all__ = [
    "delta_m",
    "delta_p",
    "hypervolume",
    "mean_rank",
    "pairwise_cosine",
    "stationarity_gap",
]

Flags = Tensor | Sequence[bool]


def delta_m(values: Tensor, baseline: Tensor, higher_is_better: Flags) -> Tensor:
    r"""Return the mean relative performance drop against a baseline: lower is better.

    $$\Delta_m = \frac{100}{K} \sum_k (-1)^{h_k} \frac{M_k - B_k}{B_k},$$

    in percent, over metrics; $h_k$ is 1 if higher is better. A baseline of 0 gives no finite
    number, a negative one turns the sign.

    Args:
        values: `(..., K)`, the metrics of one method, or of many.
        baseline: `(K,)`, those of the baseline, such as one model for each task.
        higher_is_better: `(K,)` booleans.

    Returns:
        `(...)`, in percent.

    Raises:
        ValueError: If the sizes differ.

    References:
        K.-K. Maninis, I. Radosavovic, I. Kokkinos, Attentive Single-Tasking of Multiple Tasks,
        CVPR 2019, https://arxiv.org/abs/1904.08918

    Example:
        >>> import torch, torchjd_func as jd
        >>> values, baseline = torch.tensor([93.0, 99.0, 0.5]), torch.tensor([96.0, 98.0, 0.2])
        >>> jd.metrics.delta_m(values, baseline, [True, False, True])
        tensor(-48.6182)
    """
    return -100 * _gain(values, baseline, higher_is_better).mean(-1)


def delta_p(
    values: Tensor,
    baseline: Tensor,
    higher_is_better: Flags,
    tasks: Sequence[Hashable] | None = None,
) -> Tensor:
    r"""Return the mean relative improvement over a baseline, task by task: higher is better.

    $$\Delta_p = \frac{100}{T} \sum_t \frac{1}{M_t} \sum_{k \in t} (-1)^{h_k}
    \frac{B_k - M_k}{B_k},$$

    in percent; the metrics of a task are averaged first. With one metric for each task it is
    `-delta_m`. A baseline of 0 gives no finite number, a negative one turns the sign.

    Args:
        values: `(..., K)`, the metrics of one method, or of many.
        baseline: `(K,)`, those of the baseline.
        higher_is_better: `(K,)` booleans.
        tasks: The task of each of the `K` metrics, such as `("a", "a", "b")`; by default each
            metric is a task.

    Returns:
        `(...)`, in percent.

    Raises:
        ValueError: If the sizes differ.

    References:
        B. Lin, F. Ye, Y. Zhang, I. W. Tsang, Reasonable Effectiveness of Random Weighting: A Litmus
        Test for Multi-Task Learning, TMLR 2022, https://arxiv.org/abs/2111.10603

    Example:
        >>> import torch, torchjd_func as jd
        >>> values, baseline = torch.tensor([93.0, 99.0, 0.5]), torch.tensor([96.0, 98.0, 0.2])
        >>> jd.metrics.delta_p(values, baseline, [True, False, True], ["a", "a", "b"])
        tensor(73.9636)
    """
    gain = _gain(values, baseline, higher_is_better)
    labels = list(range(gain.shape[-1]) if tasks is None else tasks)
    _check.same_size("tasks", len(labels), gain.shape[-1])
    shares = [1 / (len(set(labels)) * labels.count(label)) for label in labels]
    return 100 * (gain * gain.new_tensor(shares)).sum(-1)


def mean_rank(values: Tensor, higher_is_better: Flags) -> Tensor:
    """Return the mean over metrics of the rank of each method: 1 is the best, lower is better.

    Equal methods share the mean of their ranks. A rank depends on the set of methods compared. That
    of a method with a metric that is not-a-number is not-a-number.

    Args:
        values: `(..., n, K)`, `K` metrics of `n` methods.
        higher_is_better: `(K,)` booleans.

    Returns:
        `(..., n)`, between 1 and `n`.

    Raises:
        ValueError: If the sizes differ.

    References:
        A. Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022,
        https://arxiv.org/abs/2202.01017

    Example:
        >>> import torch, torchjd_func as jd
        >>> accuracy_and_error = torch.tensor([[0.9, 3.0], [0.8, 1.0], [0.9, 2.0]])
        >>> jd.metrics.mean_rank(accuracy_and_error, [True, False])
        tensor([2.2500, 2.0000, 1.7500])
    """
    _check.metric("values", values)
    score = values * _signs(values, higher_is_better)
    mine, theirs = score.unsqueeze(-2), score.unsqueeze(-3)
    ahead = (theirs > mine).sum(-2)
    level = (theirs == mine).sum(-2)
    ranks = torch.where(score.isnan(), torch.nan, ahead + (level + 1) / 2)
    return ranks.mean(-1).to(values.dtype)


def hypervolume(points: Tensor, reference: Tensor) -> Tensor:
    """Return the volume between a set of points and a reference that they should be below.

    Of the box under the reference, what some point dominates (minimisation). Points that are not
    below the reference in all coordinates add nothing. One and two dimensions are plain torch, and
    can be mapped, compiled and differentiated; three and more are computed by moocore, on the CPU,
    and are not.

    Args:
        points: `(k, m)`, `k` vectors of `m` losses.
        reference: `(m,)`, worse than every point of interest.

    Returns:
        `()`, the volume; 0 without points.

    Raises:
        ImportError: If `m` is above 2 and moocore is not installed.
        ValueError: If the sizes do not fit.

    References:
        E. Zitzler, L. Thiele, Multiobjective Evolutionary Algorithms: A Comparative Case Study and
        the Strength Pareto Approach, IEEE Transactions on Evolutionary Computation 3, 1999.
        C. M. Fonseca, L. Paquete, M. Lopez-Ibanez, An Improved Dimension-Sweep Algorithm for the
        Hypervolume Indicator, CEC 2006.

    Example:
        >>> import torch, torchjd_func as jd
        >>> points = torch.tensor([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0]])
        >>> jd.metrics.hypervolume(points, torch.tensor([5.0, 5.0]))
        tensor(11.)
    """
    _check.points(points, reference)
    volume = _volume if points.shape[1] > 2 else _area
    return torch.where(reference.isnan().any(), torch.nan, volume(points, reference))


def pairwise_cosine(gramian: Tensor) -> Tensor:
    """Return the cosines of the angles between gradients; those of a zero gradient are 0.

    Args:
        gramian: `(..., m, m)`, from `jd.gramian`.

    Returns:
        `(..., m, m)`.

    Raises:
        ValueError: If the matrix is not square.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.metrics.pairwise_cosine(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])
    """
    _check.matrix("gramian", gramian)
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    empty = squares <= 0
    inverse = torch.where(empty, 0.0, torch.where(empty, 1.0, squares).rsqrt())
    return (gramian * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1, 1)


def stationarity_gap(gramian: Tensor, *, relative: bool = False) -> Tensor:
    r"""Return the length of the shortest convex combination of the gradients.

    $$\min_{w \ge 0, \, \mathbf 1^\top w = 1} \lVert J^\top w \rVert,$$

    which is 0 where no direction improves all objectives: at Pareto-stationary points.

    Args:
        gramian: `(..., m, m)`, from `jd.gramian`.
        relative: Whether to divide by the length of the longest gradient, which makes the gap
            between 0 and 1 and free of the scale of the losses.

    Returns:
        `(...)`.

    Raises:
        ValueError: If the matrix is not square.

    References:
        J.-A. Desideri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization,
        Comptes Rendus Mathematique 350, 2012.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.metrics.stationarity_gap(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        tensor(2.4000)
    """
    weights, wide = min_norm_point(gramian).value.double(), gramian.double()
    square = ((wide @ weights.unsqueeze(-1)).squeeze(-1) * weights).sum(-1)
    longest = wide.diagonal(dim1=-2, dim2=-1).amax(-1)
    gap = (ratio(square, longest) if relative else square).clamp(min=0).sqrt()
    return gap.to(gramian.dtype)


def _gain(values: Tensor, baseline: Tensor, higher_is_better: Flags) -> Tensor:
    """Return the relative improvement of each metric."""
    _check.metric("values", values)
    _check.metric("baseline", baseline)
    _check.same_size("baseline", baseline.shape[-1], values.shape[-1])
    _check.one_device("`values, baseline`", [values, baseline])
    return _signs(values, higher_is_better) * (values - baseline) / baseline


def _signs(values: Tensor, higher_is_better: Flags) -> Tensor:
    """Return 1 for each metric of which more is better, and -1 for each other."""
    flags = _check.flags("higher_is_better", higher_is_better, values)
    return torch.where(flags, 1.0, -1.0).to(values.dtype)


def _area(points: Tensor, reference: Tensor) -> Tensor:
    """Return the volume in one or two dimensions."""
    inside = (points < reference).all(-1, keepdim=True)
    gaps = torch.where(inside, reference - points, 0.0)
    if points.shape[1] == 1:
        return torch.cat([gaps.new_zeros(1), gaps[:, 0]]).max()
    gaps = gaps[gaps[:, 0].argsort(descending=True)]
    reached = torch.cat([gaps.new_zeros(1), gaps[:, 1]]).cummax(0).values
    return torch.where(gaps.isinf().any(), torch.inf, (gaps[:, 0] * reached.diff()).sum())


def _volume(points: Tensor, reference: Tensor) -> Tensor:
    """Return the volume in three or more dimensions."""
    library = _check.installed("moocore", "metrics", "a hypervolume of 3 or more dimensions")
    inside = points[(points < reference).all(-1)]  # not-a-numbers are not, as in two dimensions
    arrays = [value.detach().cpu().double().numpy() for value in (inside, reference)]
    if not all(np.isfinite(array).all() for array in arrays):  # moocore crashes (0.2)
        return points.new_tensor(np.inf if len(inside) else 0.0)
    return points.new_tensor(library.hypervolume(arrays[0], ref=arrays[1]))
