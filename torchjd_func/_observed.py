"""What measures take from a `jd.Observation`, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._precision import product, squares
from torchjd_func._present import only
from torchjd_func._types import Observation
from torchjd_func.linalg._gramian import rank_tol


def gramian(observation: Observation) -> Tensor:
    """Return the Gramian."""
    return _check.observed("gramian", observation.gramian).to(torch.float64)


def weights(observation: Observation) -> Tensor:
    """Return the weights."""
    return _check.observed("weights", observation.weights).to(torch.float64)


def row_norms(observation: Observation) -> Tensor:
    """Return the lengths of the gradients."""
    return gramian(observation).diagonal().clamp(min=0).sqrt()


def count(observation: Observation) -> Tensor:
    """Return the number of present objectives, `()`."""
    ones = torch.ones_like(gramian(observation).diagonal())
    return only(observation.present, ones).sum()


def update(observation: Observation) -> tuple[Tensor, Tensor]:
    """Return `J d` and the length of `d`; a `d` that cancels up to rounding has length 0."""
    if observation.weights is None:
        return _update_by_rows(observation)
    exact = _check.observed("gramian", observation.gramian)
    inner = gramian(observation) @ weights(observation)
    square = weights(observation) @ inner
    size = weights(observation).abs() @ row_norms(observation)
    return inner, torch.where(square > rank_tol(exact) * size.square(), square, 0.0).sqrt()


def _update_by_rows(observation: Observation) -> tuple[Tensor, Tensor]:
    """Return `J d` and the length of `d`, of a rule without weights."""
    grads = [_tree.real(leaf).flatten() for leaf in _tree.leaves(observation.grads)]
    pairs = zip(map(_tree.rows, _tree.leaves(observation.jac)), grads, strict=True)
    inner = torch.stack([product(rows, grad.unsqueeze(0))[:, 0] for rows, grad in pairs]).sum(0)
    return inner, torch.stack([squares(grad) for grad in grads]).sum().sqrt()
