"""What several scalarizers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

import torch
from torch import Tensor

from torchjd_func import _check, _names, _present, _sound, _tree
from torchjd_func._host import number
from torchjd_func._lift import no_state
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._present import Present, only
from torchjd_func._types import PyTree, Scalarizer, State

Number = Tensor | float


def pure(name: str, value_fn: Callable[..., Tensor]) -> Scalarizer:
    """Lift `(losses, present=None) -> loss` to a Scalarizer with the empty state `()`."""
    return Scalarizer(name, no_state, partial(_pure_update, name, value_fn))


def _pure_update(
    name: str,
    value_fn: Callable[..., Tensor],
    losses: Tensor,
    state: State,
    *,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Compute the loss, pass the empty state on."""
    _check.stateless(name, state)
    return value_fn(losses, present=present), state


def count(losses: Tensor, present: Tensor | None) -> Tensor:
    """Return the number of objectives, a 0-d tensor in the dtype of the losses."""
    return number(_present.count(present, losses), losses)


def present_softmax(values: Tensor, present: Tensor | None) -> Tensor:
    """Return the softmax over the present objectives, 0 for the others."""
    return torch.softmax(only(present, values, -torch.inf), 0)


def optional(name: str, value: Numbers | None, *, low: float = -inf) -> Vector | None:
    """Return a hyper-parameter with one number for each objective as a vector, or `None`."""
    return None if value is None else _check.per_loss(name, value, low=low)


def entries(name: str, value: Vector | None, losses: Tensor, default: float) -> Tensor:
    """Return `value` `(m,)` in the dtype and on the device of the losses."""
    if value is None:
        return torch.full_like(losses, default)
    return _names.entries(name, value, losses)


def weights_or_uniform(weights: Vector | None, losses: Tensor, present: Tensor | None) -> Tensor:
    """Return the weights `(m,)`; one over the number of objectives by default."""
    if weights is None:
        return (1 / count(losses, present)).expand(losses.shape)
    return entries("weights", weights, losses, 1.0)


def observed(name: str, losses: PyTree, like: Tensor, present: Tensor) -> Tensor:
    """Return observed losses as a constant vector of the size and dtype of one in the state."""
    _check.losses(_tree.paths(losses), _tree.leaves(losses))
    vector = _tree.ravel(losses).detach().to(like)
    _check.losses_vector(name, vector, like.shape[0], like)
    return only(present, vector, 1.0)


def observable(name: str, present: Present, among: Tensor) -> Tensor:
    """Return which of some objectives, `(m,)` bool, are present."""
    mask = _present.as_mask(name, present, among.shape[0], among.device)
    return among if mask is None else among & mask


def renewed(moves: Tensor, values: Tensor, after: State, before: State) -> State:
    """Return what an observation renews, in the dtypes of before; nothing if it is not finite."""
    return _sound.keep(values, _present.renewed(moves, after, before), before)


def log_mean_exp(values: Tensor, weights: Tensor, kappa: Tensor, present: Tensor | None) -> Tensor:
    """Return `log(sum_i w_i exp(kappa v_i)) / kappa`, weights summing to 1; at 0 the mean."""
    values, shares = only(present, values), only(present, weights)
    centre = (shares * values).sum()
    exponent = only(present, kappa * (values - centre))
    small = exponent.abs().amax() < 1
    # Near kappa = 0 the plain formula divides rounding errors by kappa.
    excess = (shares * torch.expm1(torch.where(small, exponent, 0.0))).sum()
    logits = kappa * values + only(present, weights, 1.0).log()
    plain = torch.logsumexp(only(present, logits, -torch.inf), 0)
    divisor = torch.where(kappa == 0, 1.0, kappa)
    return torch.where(small, centre + torch.log1p(excess) / divisor, plain / divisor)
