"""From plain functions to rules: what most methods are made by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._types import Aggregator, Needs, PyTree, State, Weighting


def stateless(
    name: str,
    weights_fn: Callable[..., Tensor],
    *,
    needs: Needs = "gramian",
    widen: bool = True,
    robust: bool = False,
) -> Weighting:
    """Lift a pure function from Gramian to weights to a Weighting with the empty state `()`.

    Args:
        name: The method, for messages.
        weights_fn: `(gramian) -> weights`, from `(m, m)` to `(m,)`, in float64; with a keyword
            `present`, `(m,)` bool or `None`, if it can do without absent objectives.
        needs: What the statistic has to be, see `jd.Weighting`.
        widen: Whether `weights_fn` is given the statistic in float64, see `jd.Weighting`.
        robust: Whether rows that are not finite are outvoted, see `jd.Weighting`.

    Returns:
        The Weighting.

    Example:
        >>> import torch, torchjd_func as jd
        >>> shortest = lambda gramian: (gramian.diagonal() == gramian.diagonal().min()).double()
        >>> jd.weighted(jd.stateless("shortest", shortest))(torch.tensor([[3.0], [-1.0]]))[0]
        tensor([-1.])
    """
    update = partial(_stateless_update, name, weights_fn)
    return Weighting(name, no_state, update, needs, widen, robust)


def weighted(weighting: Weighting) -> Aggregator:
    """Lift a Weighting to the Aggregator `J -> J^T weights(J J^T)` over pytrees.

    Args:
        weighting: The method on the Gramian.

    Returns:
        The Aggregator; it shares the state of `weighting`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.weighted(jd.upgrad().weighting)(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))[0]
        tensor([0.5000, 1.5000])
    """
    init, update = partial(_weighted_init, weighting), partial(_weighted_update, weighting)
    return Aggregator(weighting.name, init, update, weighting)


def no_state(statistic: Any, key: Tensor | None) -> tuple[()]:
    """Return the empty state, the `init_fn` of every rule without memory."""
    return ()


def _stateless_update(
    name: str,
    fn: Callable[..., Tensor],
    statistic: Tensor,
    state: State,
    losses: Any,
    *,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Compute weights, pass the empty state on."""
    _check.stateless(name, state)
    if present is None:
        return fn(statistic), state
    _check.takes_present(name, fn)
    return fn(statistic, present=present), state


def _weighted_init(weighting: Weighting, jac: PyTree, key: Tensor | None) -> State:
    """Initialise a Weighting from the shape of the Gramian that `jac` would have."""
    return weighting.init(statistic_like(jac), key=key)


def _weighted_update(
    weighting: Weighting,
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    *,
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Weigh the rows of `jac` by its Gramian."""
    statistic = _statistic(weighting.needs, jac)
    weights, state = weighting(statistic, state, losses=losses, present=present)
    return _tree.weighted_sum(jac, weights), state


def _statistic(needs: Needs, jac: PyTree) -> Tensor:
    """Return what a weighting looks at."""
    if needs == "size":
        return statistic_like(jac)
    if needs == "norms":
        return torch.diag(_tree.squared_norms(jac))
    return _tree.gramian(jac)


def statistic_like(jac: PyTree) -> Tensor:
    """Return a placeholder with the shape, dtype and device of the Gramian of `jac`."""
    flat = _tree.leaves(jac)
    dtype = reduce(torch.promote_types, [_tree.accumulation_dtype(leaf.dtype) for leaf in flat])
    return _tree.placeholder(flat[0].new_zeros((), dtype=dtype), (flat[0].shape[0],) * 2)
