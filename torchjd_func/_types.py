"""The contract: a rule is a pure function from what was measured to what is done.

    weights, state = weighting(gramian, state)      # (m, m) -> (m,)
    grads, state = aggregator(jac, state)           # pytree (m, ...) -> pytree (...)
    loss, state = scalarizer(losses, state)         # (m,) -> ()

The state is a pytree of tensors (a NamedTuple, or `()` for a rule without memory); it keeps its
structure, shapes and dtypes from call to call. Nothing else is remembered and nothing is mutated.

`present`, `(m,)` bool, says which objectives a batch has. The others count as if they were not
there: a rule does with `present` what it does with the present rows alone. Their weights are 0,
their part of the state stays; where all are absent, the result is 0 and the state is unchanged,
whatever the rule says: it is then told that all zeros are present, so that it never counts none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _names, _present, _sound, _tree
from torchjd_func._precision import full_precision
from torchjd_func._present import Present
from torchjd_func._repr import in_one_line
from torchjd_func._shares import Part

PyTree = Any
State = Any
Needs = Literal["size", "norms", "gramian", "cross_gramian"]


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Weighting:
    """A method as a map from the Gramian of the gradients to the weights of the gradients.

    Weights are computed in float64 and returned in the dtype of the statistic.

    Attributes:
        name: The method, for messages.
        init_fn: `(statistic, key) -> state`; reads shape, dtype and device of the statistic only.
            A random method takes its key by `jd.random.required`.
        update_fn: `(statistic, state, losses, present=None) -> (weights, state)`; see `widen`.
            Weights are `(m,)`, the state is as it came, with `()` for none. Absent objectives have
            zeros in the statistic, and 1 as their loss.
        needs: What the statistic has to be: `"gramian"`, `J J^T` of one batch; `"cross_gramian"`,
            `J_1 J_2^T` of two independent batches, not symmetric; `"norms"`, of the diagonal of
            `J J^T` alone, beside which there may be zeros; `"size"`, of its shape alone.
        widen: Whether `update_fn` is given a float64 statistic; if not, or if only the shape is
            read, the statistic as it is, for methods that know its rounding or hand it on: its
            dtype is that in which it was computed.
        robust: Whether rows that are not finite are outvoted. If not, weights of a statistic that
            is not finite are not-a-number, and leave the state as it was.
    """

    name: str
    init_fn: Callable[[Tensor, Tensor | None], State]
    update_fn: Callable[..., tuple[Tensor, State]]
    needs: Needs = "gramian"
    widen: bool = True
    robust: bool = False

    def init(self, statistic: Tensor, *, key: Tensor | None = None) -> State:
        """Return the initial state for statistics like this one.

        Args:
            statistic: `(m, m)`; only shape, dtype and device are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        _check.square(self.name, statistic)
        return self.init_fn(statistic, _check.key_at(key, statistic.device))

    def __call__(
        self,
        statistic: Tensor,
        state: State = None,
        *,
        losses: Tensor | None = None,
        present: Present = None,
    ) -> tuple[Tensor, State]:
        """Return the weights of the gradients, and the next state.

        Args:
            statistic: `(m, m)`, the Gramian (see `needs`).
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            losses: `(m,)`; some methods need them.
            present: `(m,)` bool, which objectives there are; `None` for all.

        Returns:
            `weights` `(m,)`, in the dtype of the statistic, and `state`.
        """
        _check.square(self.name, statistic)
        state = self.init(statistic) if state is None else state
        _check.state_of(self.name, self.init_fn, state)
        wide = None
        if losses is not None:
            _check.losses_vector(self.name, losses, statistic.shape[0], statistic)
            wide = losses.to(torch.float64)
        seen = statistic.double() if self.widen and self.needs != "size" else statistic
        mask = None
        if present is not None:
            mask = _present.as_mask(self.name, present, statistic.shape[0], statistic.device)
        if mask is None:
            weights, state = _sound.weigh(self, seen, state, wide, None)
        else:
            weights, state = _sound.masked_weights(self, seen, state, wide, mask)
        same = weights.dtype == statistic.dtype
        return (weights if same else weights.to(statistic.dtype)), state

    __repr__ = in_one_line


class Partition(NamedTuple):
    """Groups of leaves, and `(gramians, state, losses, present) -> (weights, state)`.

    Gramians are `(g, m, m)`, weights `(g, m)`.
    """

    groups: _tree.Groups
    weigh: Callable[..., tuple[Tensor, State]]


class Processes(NamedTuple):
    """How a rule works with those on other processes, given rows and losses as they are."""

    average: Callable[[PyTree], PyTree]  # gradients -> their mean over processes
    factors: Callable[..., Tensor]  # (losses, present) -> (m,), of which sums are weighted means
    of_part: Callable[[Part], Any]  # the rule for a call with this part of the batch
    agree: Callable[[PyTree], Any]  # checks that a pytree is the same on all processes


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Aggregator:
    """A method as a map from a Jacobian pytree to one update direction.

    Attributes:
        name: The method, for messages.
        init_fn: `(jac, key) -> state`; reads shapes, dtypes and devices only.
        update_fn: `(jac, state, losses, present=None) -> (grads, state)`. `jac` is a pytree of
            `(m, ...)` tensors, which may hold `None` (`optree.tree_map` passes it by), `grads` the
            same without the first dimension. Rows of absent objectives are 0; `losses` is `(m,)`,
            or `None` where the caller has none.
        weighting: The same on the Gramian, sharing the state; `None` if that is not enough.
        partition: `paths -> Partition`: the same on Gramians of groups of leaves (`jd.grouped`).
        columnwise: Whether columns count one by one, so that any part of them may be aggregated.
        processes: How it works with those on other processes; `None` if it does not.
    """

    name: str
    init_fn: Callable[[PyTree, Tensor | None], State]
    update_fn: Callable[..., tuple[PyTree, State]]
    weighting: Weighting | None = None
    partition: Callable[[Sequence[str]], Partition] | None = None
    columnwise: bool = False
    processes: Processes | None = None

    def init(self, jac: PyTree, *, key: Tensor | None = None) -> State:
        """Return the initial state for Jacobians like this one.

        Args:
            jac: Pytree of `(m, ...)` tensors, or one matrix `(m, n)`; only shapes are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        leaves = _tree.leaves(jac)
        _check.jacobian(self.name, partial(_tree.paths, jac), leaves)
        return self.init_fn(jac, _check.key_at(key, leaves[0].device))

    def __call__(
        self,
        jac: PyTree,
        state: State = None,
        *,
        losses: Tensor | None = None,
        present: Present = None,
    ) -> tuple[PyTree, State]:
        """Return the update direction, to be subtracted by the optimiser, and the next state.

        Args:
            jac: Pytree of `(m, ...)` tensors, or one matrix `(m, n)`; row i is gradient i.
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            losses: `(m,)`; some methods need them.
            present: `(m,)` bool, which objectives there are; `None` for all.

        Returns:
            `grads`, the pytree without the leading dimension, and `state`.
        """
        leaves = _tree.leaves(jac)
        _check.jacobian(self.name, partial(_tree.paths, jac), leaves)
        m = leaves[0].shape[0]
        _check.losses_vector(self.name, losses, m, leaves[0])
        state = self.init(jac) if state is None else state
        _check.state_of(self.name, self.init_fn, state)
        mask = _present.as_mask(self.name, present, m, leaves[0].device)
        with full_precision():
            if self.processes is not None:  # what any process has counts: masked there
                return _present.update(self, jac, state, losses, present=mask)
            if mask is not None:
                return _sound.masked_grads(self, jac, state, losses, mask)
            grads, after = _sound.aggregated(self, jac, state, losses, None)
            return grads, _sound.keep(grads, after, state)

    __repr__ = in_one_line


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Scalarizer:
    """A method as a map from the losses to one loss, which is then differentiated once.

    The loss is computed in float32 or better and returned in the dtype of the losses.

    Attributes:
        name: The method, for messages.
        init_fn: `(losses, key) -> state`, given a vector; reads shape, dtype and device only.
        update_fn: `(losses, state, present=None) -> (loss, state)`, given a vector in float32 or
            better, with 1 in the place of absent losses. `loss` is 0-d and depends on the losses;
            what weighs them may be detached.
        observe: `(losses, state, present=None) -> state`, to be called when the method's paper says
            (FAMO: after the step, with losses of the same batch; DWA: after an epoch, with `None`),
            or `None`.
        processes: How it works with those on other processes; `None` if it does not.
    """

    name: str
    init_fn: Callable[[Tensor, Tensor | None], State]
    update_fn: Callable[..., tuple[Tensor, State]]
    observe: Callable[..., State] | None = None
    processes: Processes | None = None

    def init(self, losses: PyTree, *, key: Tensor | None = None) -> State:
        """Return the initial state for losses like these.

        Args:
            losses: Tensor or pytree of tensors, `m` numbers in all; only shapes are read.
            key: `(2,)`, from `jd.random.key`; random methods need it.

        Returns:
            The state, a pytree of tensors.
        """
        wide = _tree.wide(_names.vector(self, losses))
        return self.init_fn(wide, _check.key_at(key, wide.device))

    def __call__(
        self, losses: PyTree, state: State = None, *, present: Present = None
    ) -> tuple[Tensor, State]:
        """Return one loss, to be differentiated, and the next state.

        Args:
            losses: Tensor or pytree of tensors, `m` numbers in all, counted in leaf order.
            state: What `init` or the previous call returned; `None` stands for a fresh `init`.
            present: Which there are, a tree of bools like the losses, or `(m,)`; `None` for all.

        Returns:
            `loss`, a 0-d tensor, and `state`.
        """
        vector = _names.vector(self, losses)
        wide = _tree.wide(vector)
        state = self.init_fn(wide, None) if state is None else state
        _check.state_of(self.name, self.init_fn, state)
        mask = _present.as_mask(self.name, present, len(wide), wide.device)
        if mask is None or self.processes is not None:  # what any process has counts: masked there
            loss, after = _present.update(self, wide, state, present=mask)
            _check.loss(self.name, loss)
            if self.processes is None:
                after = _sound.keep((loss, wide), after, state)
            return loss.to(vector.dtype), after
        known = _present.losses(wide, mask)
        loss, after = _present.update(self, known, state, present=_present.usable(mask))
        _check.loss(self.name, loss)
        after = _sound.keep((loss, known), after, state)
        loss = torch.where(mask.any(), loss, 0).to(vector.dtype)
        return loss, _present.kept(mask, after, state)

    __repr__ = in_one_line


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
    present: Tensor | None = None
    """`(m,)` bool; the parts of absent objectives are 0, and their losses 1"""
