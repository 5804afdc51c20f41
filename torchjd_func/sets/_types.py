"""The contract for sets: a rule moves `k` models at once, by what was measured on all of them.

    directions, state = rule(jacs, state, losses=losses)        # pytree (k, m, ...) -> (k, ...)
    weights, state = rule.weighting(gramians, state, losses=losses)     # (k, m, m) -> (k, m)

The same as `jd.Aggregator` and its weighting, with a first dimension that counts the models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func._lift import statistic_like
from torchjd_func._repr import in_one_line
from torchjd_func._types import Needs, PyTree, State


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class SetRule:
    r"""A method as a map from the Jacobians and losses of `k` models to `k` update directions.

    Model `i` goes along $d_i = J_i^\top w_i$ or, if the models share their gradients, along
    $d_i = \sum_j J_j^\top w_{ij}$: the weights are `(k, m)`, or `(k, k, m)`. They are computed in
    float64. A rule may be vmapped over several sets.

    Attributes:
        name: The method, for messages.
        init_fn: `(gramians, key) -> state`; reads shape, dtype and device of `(k, m, m)` only.
        update_fn: `(gramians, losses, state) -> (weights, state)`, given float64.
        needs: `"gramian"`, or `"size"` if the losses are enough: then the Gramians are not
            computed, and only the shape of those given to `weighting` is read.
    """

    name: str
    init_fn: Callable[[Tensor, Tensor | None], State]
    update_fn: Callable[[Tensor, Tensor, State], tuple[Tensor, State]]
    needs: Needs = "gramian"

    def init(self, jacs: PyTree, *, key: Tensor | None = None) -> State:
        """Return the initial state for Jacobians like these.

        Args:
            jacs: Pytree of `(k, m, ...)` tensors; only shapes are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        return self.init_fn(_like(_flat(self.name, jacs)[0]), key)

    def weighting(
        self, gramians: Tensor, state: State = None, *, losses: Tensor
    ) -> tuple[Tensor, State]:
        """Return the weights of the gradients, and the next state.

        Args:
            gramians: `(k, m, m)`, a Gramian for each model.
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            losses: `(k, m)`.

        Returns:
            `weights`, `(k, m)`: `[i]` are those of model i for its own gradients; or `(k, k, m)`:
            `[i, j]` are those of model i for the gradients of model j. In the dtype of `gramians`.
            Not-a-number for a model whose losses are not finite. And `state`.
        """
        _check.set_gramians(self.name, gramians)
        values = _check.set_losses(self.name, losses, gramians).double()
        state = self.init_fn(gramians, None) if state is None else state
        given = gramians if self.needs == "size" else gramians.double()
        weights, state = self.update_fn(given, values, state)
        sound = _tree.per_row(values.isfinite().all(-1), weights)
        return torch.where(sound, weights, torch.nan).to(gramians.dtype), state

    def __call__(
        self, jacs: PyTree, state: State = None, *, losses: Tensor
    ) -> tuple[PyTree, State]:
        """Return a direction for each model, to be subtracted by its optimiser, and the next state.

        Args:
            jacs: Pytree of `(k, m, ...)` tensors, from `torch.func.vmap` of `jd.jac`.
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            losses: `(k, m)`.

        Returns:
            `directions`, a pytree of `(k, ...)` tensors, and `state`.
        """
        flat, rebuild = _flat(self.name, jacs)
        gramians = _like(flat) if self.needs == "size" else vmap(_tree.gramian)(flat)
        weights, state = self.weighting(gramians, state, losses=losses)
        return rebuild(combine(flat, weights)), state

    __repr__ = in_one_line


def combine(flat: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Weigh Jacobians `(k, m, ...)` by `(k, m)`, or all of them by each row of `(k, k, m)`."""
    if weights.ndim == 2:
        return vmap(_tree.weighted_sum)(flat, weights)
    pooled = [leaf.flatten(0, 1) for leaf in flat]
    return vmap(partial(_tree.weighted_sum, pooled))(weights.flatten(1))


def _flat(name: str, jacs: PyTree) -> tuple[list[Tensor], Callable[[Any], PyTree]]:
    """Return the leaves of Jacobians; a list of tensors is what torch.func can map over."""
    flat, rebuild = _tree.flatten(jacs)
    _check.set_jacobians(name, partial(_tree.paths, jacs), flat)
    return flat, rebuild


def _like(flat: list[Tensor]) -> Tensor:
    """Return a placeholder with shape, dtype and device of the Gramians, `(k, m, m)`."""
    k, m = flat[0].shape[:2]
    return _tree.placeholder(statistic_like([leaf[0] for leaf in flat]), (k, m, m))
