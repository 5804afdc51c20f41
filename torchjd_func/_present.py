"""Which objectives a batch has.

What is absent is taken out before a rule sees it, not-a-numbers included, so that a rule only has
to count what is left.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _host, _tree
from torchjd_func._host import Array

PyTree = Any
State = Any
Present = Any  # (m,) bool tensor, or a pytree of bools, m in all; None for all objectives

# Squared distance, relative to that of the longest row, from which no row is near: its weight in a
# min-norm point is below rounding, and below what a solver takes for a sign.
FAR = 1e40


def as_mask(name: str, present: Present, m: int, device: torch.device) -> Tensor | None:
    """Return which objectives there are, `(m,)` bool; `None` for all."""
    if present is None:
        return None
    return _tree.ravel(_check.present(name, _tree.leaves(present), m, device))


def usable(present: Tensor) -> Tensor:
    """Return the mask that a rule is given: all where there is none, so that no count is 0."""
    return present | ~present.any()


def statistic(matrix: Tensor, present: Tensor) -> Tensor:
    """Return a Gramian `(m, m)` with zeros in the rows and columns of absent objectives."""
    return torch.where(present & present.unsqueeze(-1), matrix, 0)


def rows(jac: PyTree, present: Tensor) -> PyTree:
    """Return a Jacobian with zeros in the rows of absent objectives."""
    return _tree.map(lambda leaf: torch.where(_tree.per_row(present, leaf), leaf, 0), jac)


def losses(vector: Tensor | None, present: Tensor) -> Tensor | None:
    """Return losses with 1, of which logarithms and quotients are finite, where there is none."""
    return None if vector is None else torch.where(present, vector, 1)


def kept(present: Tensor, after: State, before: State) -> State:
    """Return the next state; that of before where all objectives are absent."""
    return _tree.map(partial(torch.where, present.any()), after, before)


def update(rule: Any, *args: Any, present: Tensor | None) -> Any:
    """Call the `update_fn` of a rule, with `present` only where there is one."""
    if present is None:
        return _check.pair(rule, rule.update_fn(*args))
    _check.takes_present(rule.name, rule.update_fn)
    return _check.pair(rule, rule.update_fn(*args, present=present))


def uniform(present: Tensor | None, like: Tensor) -> Tensor:
    """Return equal weights of sum 1 for the rows of `like` that there are."""
    m = like.shape[0]
    if present is None:
        return like.new_full((m,), 1 / max(m, 1))
    counted = present.to(like.dtype)
    return counted / counted.sum()


def count(present: Tensor | None, like: Tensor) -> int | Tensor:
    """Return how many rows of `like` there are."""
    return like.shape[0] if present is None else present.sum()


def only(present: Tensor | None, values: Tensor, other: float = 0.0) -> Tensor:
    """Return values `(m,)`, or by row `(m, ...)`, with `other` in the place of absent ones."""
    return values if present is None else torch.where(_tree.per_row(present, values), values, other)


def mean(present: Tensor | None, values: Tensor) -> Tensor:
    """Return the mean of values `(m,)`."""
    return values.mean() if present is None else only(present, values).sum() / present.sum()


def renewed(present: Tensor | None, after: PyTree, before: PyTree) -> PyTree:
    """Return what a state holds for each objective: as before for absent ones."""
    if present is None:
        return after
    return _tree.map(lambda a, b: torch.where(_tree.per_row(present, a), a, b), after, before)


def alone(present: Tensor | None, weights: Tensor, total: float | Tensor = 1.0) -> Tensor:
    """Return weights as the present objectives have them alone, of the sum `total`.

    They keep their proportions; where all are 0 they are equal.
    """
    if present is None:
        return weights
    left = only(present, weights)
    size = left.sum()
    scaled = left / torch.where(size > 0, size, 1.0)
    return total * torch.where(size > 0, scaled, uniform(present, weights))


def together(present: Tensor | None, weights: Tensor, before: Tensor) -> Tensor:
    """Undo `alone`: the present objectives share anew what they had of the sum of `before`."""
    if present is None:
        return weights
    had, have = only(present, before).sum(), only(present, weights).sum()
    return torch.where(present, weights * (had / have), before)


def apart(gramian: Array, present: Array | None) -> Array:
    """Put rows that are 0 because they are absent where no min-norm point leans on them."""
    if present is None:
        return gramian
    longest = _host.constant(gramian).diagonal().max()
    return gramian + _host.identity(gramian) * (~present * (FAR * longest + (longest == 0)))
