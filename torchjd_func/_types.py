"""The contract: a rule is a pure function from what was measured to what is done.

    weights, state = weighting(gramian, state)      # (m, m) -> (m,)
    grads, state = aggregator(jac, state)           # pytree (m, ...) -> pytree (...)
    loss, state = scalarizer(losses, state)         # (m,) -> ()

The state is a pytree of tensors (a NamedTuple, or `()` for a rule without memory); it keeps its
structure, shapes and dtypes from call to call. Nothing else is remembered and nothing is mutated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _tree

PyTree = Any
State = Any
Needs = Literal["size", "gramian", "cross_gramian"]


def _in_one_line(self: Any) -> str:
    """Return the kind of a rule, and its name."""
    return f"{type(self).__name__}({self.name})"


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Weighting:
    """A method as a map from the Gramian of the gradients to the weights of the gradients.

    Weights are computed in float64 and returned in the dtype of the statistic.

    Attributes:
        name: The method, for messages.
        init_fn: `(statistic, key) -> state`; reads shape, dtype and device of the statistic only.
        update_fn: `(statistic, state, losses) -> (weights, state)`; see `widen`.
        needs: What the statistic has to be: `"gramian"`, `J J^T` of one batch; `"cross_gramian"`,
            `J_1 J_2^T` of two independent batches, not symmetric; `"size"`, of its shape alone.
        widen: Whether `update_fn` is given a float64 statistic; if not, or if only the shape is
            read, the statistic as it is, for methods that know its rounding or hand it on.
    """

    name: str
    init_fn: Callable[[Tensor, Tensor | None], State]
    update_fn: Callable[[Tensor, State, Tensor | None], tuple[Tensor, State]]
    needs: Needs = "gramian"
    widen: bool = True

    def init(self, statistic: Tensor, *, key: Tensor | None = None) -> State:
        """Return the initial state for statistics like this one.

        Args:
            statistic: `(m, m)`; only shape, dtype and device are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        _check.square(self.name, statistic)
        return self.init_fn(statistic, key)

    def __call__(
        self, statistic: Tensor, state: State = None, *, losses: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the weights of the gradients, and the next state.

        Args:
            statistic: `(m, m)`, the Gramian (see `needs`).
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            losses: `(m,)`; some methods need them.

        Returns:
            `weights` `(m,)`, in the dtype of the statistic, and `state`.
        """
        _check.square(self.name, statistic)
        _check.losses_vector(self.name, losses, statistic.shape[0])
        state = self.init(statistic) if state is None else state
        wide = None if losses is None else losses.to(torch.float64)
        given = statistic.double() if self.widen and self.needs != "size" else statistic
        weights, state = self.update_fn(given, state, wide)
        same = weights.dtype == statistic.dtype
        return (weights if same else weights.to(statistic.dtype)), state

    __repr__ = _in_one_line


class Partition(NamedTuple):
    """Groups of leaves, and `(gramians (g, m, m), state, losses) -> (weights (g, m), state)`."""

    groups: _tree.Groups
    weigh: Callable[[Tensor, State, Tensor | None], tuple[Tensor, State]]


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Aggregator:
    """A method as a map from a Jacobian pytree to one update direction.

    Attributes:
        name: The method, for messages.
        init_fn: `(jac, key) -> state`; reads shapes, dtypes and devices only.
        update_fn: `(jac, state, losses) -> (grads, state)`.
        weighting: The same on the Gramian, sharing the state; `None` if that is not enough.
        partition: `paths -> Partition`: the same on Gramians of groups of leaves (`jd.grouped`).
        columnwise: Whether columns count one by one, so that any part of them may be aggregated.
        average: Brings gradients of heads together over processes (`jd.distributed`).
    """

    name: str
    init_fn: Callable[[PyTree, Tensor | None], State]
    update_fn: Callable[[PyTree, State, Tensor | None], tuple[PyTree, State]]
    weighting: Weighting | None = None
    partition: Callable[[Sequence[str]], Partition] | None = None
    columnwise: bool = False
    average: Callable[[PyTree], PyTree] | None = None

    def init(self, jac: PyTree, *, key: Tensor | None = None) -> State:
        """Return the initial state for Jacobians like this one.

        Args:
            jac: Pytree of `(m, ...)` tensors, or one matrix `(m, n)`; only shapes are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        _check.jacobian(self.name, partial(_tree.paths, jac), _tree.leaves(jac))
        return self.init_fn(jac, key)

    def __call__(
        self, jac: PyTree, state: State = None, *, losses: Tensor | None = None
    ) -> tuple[PyTree, State]:
        """Return the update direction, to be subtracted by the optimiser, and the next state.

        Args:
            jac: Pytree of `(m, ...)` tensors, or one matrix `(m, n)`; row i is gradient i.
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            losses: `(m,)`; some methods need them.

        Returns:
            `grads`, the pytree without the leading dimension, and `state`.
        """
        _check.jacobian(self.name, partial(_tree.paths, jac), _tree.leaves(jac))
        _check.losses_vector(self.name, losses, _tree.leading_size(jac))
        state = self.init(jac) if state is None else state
        return self.update_fn(jac, state, losses)

    __repr__ = _in_one_line


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Scalarizer:
    """A method as a map from the losses to one loss, which is then differentiated once.

    The loss is computed in float32 or better and returned in the dtype of the losses.

    Attributes:
        name: The method, for messages.
        init_fn: `(losses, key) -> state`, given a vector; reads shape, dtype and device only.
        update_fn: `(losses, state) -> (loss, state)`, given a vector in float32 or better.
        observe: `(losses, state) -> state`, to be called when the method's paper says (FAMO: after
            the step, with losses of the same batch; DWA: after an epoch, with `None`), or `None`.
        average: Brings gradients of the loss together over processes (`jd.distributed`).
    """

    name: str
    init_fn: Callable[[Tensor, Tensor | None], State]
    update_fn: Callable[[Tensor, State], tuple[Tensor, State]]
    observe: Callable[[PyTree, State], State] | None = None
    average: Callable[[PyTree], PyTree] | None = None

    def init(self, losses: PyTree, *, key: Tensor | None = None) -> State:
        """Return the initial state for losses like these.

        Args:
            losses: Tensor or pytree of tensors, `m` numbers in all; only shapes are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        _check.losses(_tree.paths(losses), _tree.leaves(losses))
        return self.init_fn(_tree.wide(_tree.ravel(losses)), key)

    def __call__(self, losses: PyTree, state: State = None) -> tuple[Tensor, State]:
        """Return one loss, to be differentiated, and the next state.

        Args:
            losses: Tensor or pytree of tensors, `m` numbers in all, counted in leaf order.
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.

        Returns:
            `loss`, a 0-d tensor, and `state`.
        """
        _check.losses(_tree.paths(losses), _tree.leaves(losses))
        vector = _tree.ravel(losses)
        wide = _tree.wide(vector)
        state = self.init_fn(wide, None) if state is None else state
        loss, state = self.update_fn(wide, state)
        return loss.to(vector.dtype), state

    __repr__ = _in_one_line


class Observation(NamedTuple):
    """What one aggregation saw and did; the argument of a measure. Absent parts are `None`."""

    gramian: Tensor | None
    """`(m, m)`"""
    weights: Tensor | None
    """`(m,)`"""
    losses: Tensor | None
    """`(m,)`"""
    jac: PyTree | None
    """pytree of `(m, ...)`"""
    grads: PyTree | None
    """pytree of `(...)`"""


def stateless(
    name: str,
    weights_fn: Callable[[Tensor], Tensor],
    *,
    needs: Needs = "gramian",
    widen: bool = True,
) -> Weighting:
    """Lift a pure function from Gramian to weights to a Weighting with the empty state `()`.

    Args:
        name: The method, for messages.
        weights_fn: `(gramian) -> weights`, from `(m, m)` to `(m,)`, in float64.
        needs: What the statistic has to be, see `jd.Weighting`.
        widen: Whether `weights_fn` is given the statistic in float64, see `jd.Weighting`.

    Returns:
        The Weighting.

    Example:
        >>> import torch, torchjd_func as jd
        >>> shortest = lambda gramian: (gramian.diagonal() == gramian.diagonal().min()).double()
        >>> jd.weighted(jd.stateless("shortest", shortest))(torch.tensor([[3.0], [-1.0]]))[0]
        tensor([-1.])
    """
    return Weighting(name, no_state, partial(_stateless_update, name, weights_fn), needs, widen)


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
    name: str, fn: Callable[[Tensor], Tensor], statistic: Tensor, state: State, losses: Any
) -> tuple[Tensor, State]:
    """Compute weights, pass the empty state on."""
    _check.stateless(name, state)
    return fn(statistic), state


def _weighted_init(weighting: Weighting, jac: PyTree, key: Tensor | None) -> State:
    """Initialise a Weighting from the shape of the Gramian that `jac` would have."""
    return weighting.init(statistic_like(jac), key=key)


def _weighted_update(
    weighting: Weighting, jac: PyTree, state: State, losses: Tensor | None
) -> tuple[PyTree, State]:
    """Weigh the rows of `jac` by its Gramian."""
    statistic = statistic_like(jac) if weighting.needs == "size" else _tree.gramian(jac)
    weights, state = weighting(statistic, state, losses=losses)
    return _tree.weighted_sum(jac, weights), state


def statistic_like(jac: PyTree) -> Tensor:
    """Return a placeholder with the shape, dtype and device of the Gramian of `jac`."""
    flat = _tree.leaves(jac)
    dtype = reduce(torch.promote_types, [_tree.accumulation_dtype(leaf.dtype) for leaf in flat])
    return _tree.placeholder(flat[0].new_zeros((), dtype=dtype), (flat[0].shape[0],) * 2)
