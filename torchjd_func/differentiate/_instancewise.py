"""Objectives with losses for each example, which depend on this example alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func.differentiate._filled import filled
from torchjd_func.differentiate._layerwise import Ranks, count
from torchjd_func.differentiate._linearized import Linearized
from torchjd_func.differentiate._objective import (
    Function,
    linearize_by_layers,
    linearize_whole,
    plan_by_layers,
    rows_like,
    shown,
)
from torchjd_func.differentiate._pullback import tracked_inside
from torchjd_func.differentiate._request import Request

PyTree = Any


class Example(NamedTuple):
    """The loss of one example, `fn(params, *example) -> ()`, and how to map it over a batch."""

    fn: Callable[..., Any]
    in_dims: tuple[Any, ...] | None
    randomness: str

    def dims(self, count: int) -> tuple[Any, ...]:
        """Return the batched dimension of each of `count` arguments."""
        return (None, *[0] * (count - 1)) if self.in_dims is None else self.in_dims

    def all_dims(self, count: int) -> tuple[Any, ...]:
        """Return the batched dimension of each of all arguments, of which one has examples."""
        dims = self.dims(count)
        _check.in_dims(dims, count)
        return dims


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class InstanceWise:
    """An objective `fn(params, *batch) -> (b,)` whose loss i depends on example i alone.

    Or `(b, k)`, of which row i does.

    Attributes:
        fn: The objective over a batch.
        example: The loss of one example that `fn` maps over a batch; `None` if there is none.
        plans: What layer-by-layer routes found out about `fn`, by the shapes of its arguments; it
            saves time, and changes no result.
        named_plans: The same of calls with keyword arguments, by their names.
        ranks: Which processes have the other examples (`jd.distributed.gathered`).
        in_dims: Where the examples of each argument lie; `None` if dimension 0 of all of a size.
        check: Whether layer-by-layer routes prove what they found out, once.
    """

    fn: Callable[..., Any]
    example: Example | None = None
    plans: dict[Any, Any] = field(default_factory=dict)
    named_plans: dict[tuple[str, ...], dict[Any, Any]] = field(default_factory=dict)
    ranks: Ranks | None = None
    in_dims: tuple[Any, ...] | None = None
    check: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the losses, one for each example (and `aux`, if `fn` has one)."""
        objective, given = self.by_position(args, kwargs)
        return objective.fn(*given)

    def linearize(self, request: Request) -> Linearized:
        """Go layer by layer, or through the whole function."""
        _check.not_over_examples(request.spans, self)
        objective, args = self.by_position(request.args, request.kwargs)
        argnums = _check.normalised(request.argnums, len(request.args))
        request = request._replace(args=args, kwargs={}, argnums=argnums)
        if objective.ranks is not None:
            return linearize_by_layers(*filled(objective, objective.ranks, request))
        if request.route in ("auto", "layerwise"):
            return linearize_by_layers(objective, request)
        check = partial(_check.one_for_each_example, several=objective.several)
        return linearize_whole(objective.fn, request, check)

    def wrap(self, change: Callable[[Function], Function]) -> InstanceWise:
        """Return the objective of the changed function, with the same structure."""
        if self.example is None:
            options = {"ranks": self.ranks, "in_dims": self.in_dims, "check": self.check}
            return InstanceWise(change(self.fn), **options)
        fn, in_dims, randomness = self.example
        return replace(per_example(change(fn), in_dims, randomness), ranks=self.ranks)

    def by_position(
        self, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[InstanceWise, tuple[Any, ...]]:
        """Return the objective that takes keyword arguments by position, and all arguments."""
        if not kwargs:
            return self, args
        names, given = tuple(sorted(kwargs)), (*args, *(kwargs[name] for name in sorted(kwargs)))
        compiling = torch.compiler.is_compiling()
        every = self.named_plans
        plans = every.get(names, {}) if compiling else every.setdefault(names, {})
        change = partial(partial, _call_by_name, names)
        if self.example is None:
            dims = self.in_dims and (*self.in_dims, *(batched_dim(x) for x in given[len(args) :]))
            return replace(self, fn=change(self.fn), plans=plans, in_dims=dims), given
        fn, _, randomness = self.example
        dims = (*self.example.dims(len(args)), *(batched_dim(x) for x in given[len(args) :]))
        mapped = per_example(change(fn), dims, randomness)
        return replace(mapped, ranks=self.ranks, plans=plans), given

    def rows_like(self, primals: PyTree, m: int) -> PyTree:
        """Return placeholders for the rows of all examples, those of other processes included."""
        return rows_like(primals, m if self.ranks is None else count(m, primals, self.ranks))

    def plan(self, request: Request) -> None:
        """Find out what layer-by-layer routes need to know, for graphs to replay it."""
        layered = self.ranks is not None or request.route in ("auto", "layerwise")
        if layered and not torch.compiler.is_compiling():
            plan_by_layers(self, request)

    @property
    def several(self) -> bool:
        """Whether an example may have several losses."""
        return self.example is None and self.ranks is None

    @property
    def spans_processes(self) -> bool:
        """Whether other processes have examples."""
        return self.ranks is not None

    def __repr__(self) -> str:
        return f"InstanceWise({shown(self.fn if self.example is None else self.example.fn)})"


def _call_by_name(names: tuple[str, ...], fn: Callable[..., Any], /, *args: Any) -> Any:
    """Hand the last arguments over by name."""
    count = len(args) - len(names)
    return fn(*args[:count], **dict(zip(names, args[count:], strict=True)))


def batched_dim(value: Any) -> int | None:
    """Return the dimension of a keyword argument that has examples: tensors, but 0-d ones."""
    leaves = _tree.leaves(value)
    return 0 if leaves and all(isinstance(x, Tensor) and x.ndim for x in leaves) else None


def instancewise(
    fn: Callable[..., Any], in_dims: tuple[Any, ...] | None = None, *, check: bool = True
) -> InstanceWise:
    """Declare that loss i of `fn` depends on example i alone.

    Layer-by-layer routes watch `fn` run with this batch and with one example more, to see where
    examples lie, and prove once for each new way that `fn` runs that what they found out is right.
    What is not proven costs one backward pass for each loss, with a warning; so does, without one,
    what runs with no other number of examples, as `jd.explain_gramian` says.
    A graph of `torch.compile` replays what `jd.init_state` or a call before it has proven, if it
    does the same operations.

    Args:
        fn: `fn(params, *batch) -> (b,)`, or `((b,), aux)`. Nothing may mix examples: no batch
            normalisation in training mode. Or `(b, k)`, k losses for each example, at k backward
            passes: `m = b k` objectives, those of an example next to each other, the same k for
            every b.
        in_dims: Where the examples of each argument lie, as for `torch.func.vmap`; `None` for an
            argument without. By default dimension 0 of each tensor with as many entries as there
            are losses.
        check: Whether to prove. Without it, where `fn` mixes examples, results are wrong.

    Returns:
        The same function, as an objective that transforms know the structure of.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.instancewise(lambda w, x: (x @ w).square())
        >>> jd.gramian(objective)(torch.ones(2), torch.eye(2))
        tensor([[4., 0.],
                [0., 4.]])
    """
    _check.objective(fn)
    if in_dims is not None:
        _check.in_dims(in_dims)
    return InstanceWise(fn, in_dims=in_dims, check=check)


def per_example(
    fn: Callable[..., Any], in_dims: tuple[Any, ...] | None = None, randomness: str = "error"
) -> InstanceWise:
    """Make an objective over a batch from the loss of ONE example.

    Args:
        fn: `fn(params, *example) -> ()`, or `((), aux)`.
        in_dims: As for `torch.func.vmap`, for all arguments, `params` included. By default `params`
            is not batched, and all other arguments are over dimension 0. So are keyword arguments
            that are tensors, but 0-d ones, which all examples share, as they do other values.
        randomness: As for `torch.func.vmap`: `"error"`, `"different"` or `"same"`.

    Returns:
        The instance-wise objective `(params, *batch) -> (b,)`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.per_example(lambda w, x: (x @ w).square())
        >>> objective(torch.ones(2), torch.eye(2))
        tensor([1., 1.])
    """
    _check.objective(fn)
    _check.choice("randomness", randomness, ("error", "different", "same"))
    if in_dims is not None:
        _check.in_dims(in_dims)

    example = Example(fn, in_dims, randomness)
    return InstanceWise(partial(_batched, example), example)


def _batched(example: Example, /, *args: Any) -> Any:
    """Map the loss of one example over a batch."""
    fn, dims = tracked_inside(example.fn), example.all_dims(len(args))
    return vmap(fn, in_dims=dims, randomness=example.randomness)(*args)
