"""Weights from a part of the parameters, or from the features that tasks share."""

from __future__ import annotations

from torchjd_func import _check


def features(path: str) -> bool:
    r"""Take weights from the gradients by the shared features: `where=jd.features`.

    In `jd.grad` and `jd.grad_and_value` of an objective of `jd.multitask`, with features `z`:

    $$w = \mathcal W(Z Z^\top), \qquad Z_i = \partial \ell_i / \partial z, \qquad
    d = J^\top w = (\partial z / \partial \theta)^\top Z^\top w.$$

    `m` passes through heads, and ONE through the trunk, where the Gramian of the shared parameters
    takes `m`. It is an approximation: what `w` promises, such as not to conflict, holds for steps
    of the features. By the chain rule, $J J^\top \preceq \lVert \partial z / \partial \theta
    \rVert^2 Z Z^\top$, an upper bound of the objective of MGDA (hence MGDA-UB), and where `z` is a
    bijection of what the trunk can change, stationary points are the same.

    Args:
        path: Not looked at: this is a name for `where`, not a predicate to call.

    Returns:
        Nothing useful: it raises where it is called.

    Raises:
        ValueError: If it is used elsewhere.

    References:
        O. Sener, V. Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018
        (MGDA-UB), https://arxiv.org/abs/1810.04650
        L. Liu et al., Towards Impartial Multi-task Learning, ICLR 2021 (IMTL-G on features),
        https://openreview.net/forum?id=IMPnRXEWpvr

    Differs from other implementations:
        LibMTL's `rep_grad=True` is this for methods that are written for it; here it is for all
        with a weighting.

    Example:
        >>> import torch, torchjd_func as jd
        >>> heads = {"a": lambda p, z, x: (p * z).sum(), "b": lambda p, z, x: -z[0]}
        >>> objective = jd.multitask(lambda w, x: x @ w, heads)
        >>> params = (torch.ones(2), {"a": torch.tensor(3.0), "b": {}})
        >>> step = jd.grad(objective, jd.mgda(), where=jd.features)
        >>> step(None, params, torch.eye(2))[0][0]
        tensor([-0.3600,  0.4800])
    """
    _check.not_features(True, f"the path {path!r} of a parameter")
    return False
