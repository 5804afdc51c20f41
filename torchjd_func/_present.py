"""Which objectives a batch has.

What is absent is taken out before a rule sees it, not-a-numbers included, so that a rule only has
to count what is left.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree

PyTree = Any
State = Any
Present = Any  # (m,) bool tensor, or a pytree of bools, m in all; None for all objectives


def as_mask(name: str, present: Present, m: int, device: torch.device) -> Tensor | None:
    """Return which objectives there are, `(m,)` bool; `None` for all."""
    if present is None:
        return None
    flags = [torch.as_tensor(leaf, device=device) for leaf in _tree.leaves(present)]
    _check.present(name, flags, m)
    return _tree.ravel(flags)


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
        return rule.update_fn(*args)
    _check.takes_present(rule.name, rule.update_fn)
    return rule.update_fn(*args, present=present)
