"""What several scalarizers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

import torch
from torch import Tensor

from torchjd_func import _check, _names, _tree
from torchjd_func._lift import no_state
from torchjd_func._types import PyTree, Scalarizer, State

Vector = _tree.Numbers
Number = Tensor | float


def pure(name: str, value_fn: Callable[[Tensor], Tensor]) -> Scalarizer:
    """Lift `(losses) -> loss` to a Scalarizer with the empty state `()`."""
    return Scalarizer(name, no_state, partial(_pure_update, name, value_fn))


def _pure_update(
    name: str, value_fn: Callable[[Tensor], Tensor], losses: Tensor, state: State
) -> tuple[Tensor, State]:
    """Compute the loss, pass the empty state on."""
    _check.stateless(name, state)
    return value_fn(losses), state


def optional(name: str, value: Vector | None, *, low: float = -inf) -> _names.Vector | None:
    """Return a hyper-parameter with one number for each objective as a vector, or `None`."""
    return None if value is None else _check.per_loss(name, value, low=low)


def entries(name: str, value: _names.Vector | None, losses: Tensor, default: float) -> Tensor:
    """Return `value` `(m,)` in the dtype and on the device of the losses."""
    if value is None:
        return torch.full_like(losses, default)
    return _names.entries(name, value, losses)


def weights_or_uniform(weights: Tensor | None, losses: Tensor) -> Tensor:
    """Return the weights `(m,)`; `1/m` by default."""
    return entries("weights", weights, losses, 1 / losses.shape[0])


def number(value: Number, losses: Tensor) -> Tensor:
    """Return `value` as a 0-d tensor in the dtype and on the device of the losses."""
    return value.to(losses) if isinstance(value, Tensor) else losses.new_full((), value)


def observed(name: str, losses: PyTree, like: Tensor) -> Tensor:
    """Return observed losses as a constant vector of the size and dtype of one in the state."""
    _check.losses(_tree.paths(losses), _tree.leaves(losses))
    vector = _tree.ravel(losses).detach().to(like)
    _check.losses_vector(name, vector, like.shape[0])
    return vector


def log_mean_exp(values: Tensor, weights: Tensor, kappa: Tensor) -> Tensor:
    """Return `log(sum_i w_i exp(kappa v_i)) / kappa`, weights summing to 1; at 0 the mean."""
    centre = (weights * values).sum()
    exponent = kappa * (values - centre)
    small = exponent.abs().amax() < 1
    # Near kappa = 0 the plain formula divides rounding errors by kappa.
    excess = (weights * torch.expm1(torch.where(small, exponent, 0.0))).sum()
    plain = torch.logsumexp(kappa * values + weights.log(), 0)
    divisor = torch.where(kappa == 0, 1.0, kappa)
    return torch.where(small, centre + torch.log1p(excess) / divisor, plain / divisor)
