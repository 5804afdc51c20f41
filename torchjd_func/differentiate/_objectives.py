"""Objectives whose structure is part of their type, so that transforms can use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.func import vmap

from torchjd_func import _check
from torchjd_func.differentiate._layerwise import Ranks


class Example(NamedTuple):
    """The loss of one example, `fn(params, *example) -> ()`, and how to map it over a batch."""

    fn: Callable[..., Any]
    in_dims: tuple[Any, ...] | None
    randomness: str

    def dims(self, count: int) -> tuple[Any, ...]:
        """Return the batched dimension of each of `count` arguments."""
        return (None, *[0] * (count - 1)) if self.in_dims is None else self.in_dims


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class InstanceWise:
    """An objective `fn(params, *batch) -> (b,)` whose loss i depends on example i alone.

    Attributes:
        fn: The objective over a batch.
        example: The loss of one example that `fn` maps over a batch; `None` if there is none.
        plans: What layer-by-layer routes found out about `fn`, by the shapes of its arguments; it
            saves time, and changes no result.
        ranks: Who has the other examples of the batch (`jd.distributed.gathered`).
        in_dims: Where the examples of each argument lie; `None` if dimension 0 of all of a size.
        check: Whether layer-by-layer routes prove what they found out, once.
    """

    fn: Callable[..., Any]
    example: Example | None = None
    plans: dict[Any, Any] = field(default_factory=dict)
    ranks: Ranks | None = None
    in_dims: tuple[Any, ...] | None = None
    check: bool = True

    def __call__(self, *args: Any) -> Any:
        """Return the losses, one for each example (and `aux`, if `fn` has one)."""
        return self.fn(*args)

    def wrap(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> InstanceWise:
        """Return the objective of the changed function, with the same structure."""
        if self.example is None:
            options = {"ranks": self.ranks, "in_dims": self.in_dims, "check": self.check}
            return InstanceWise(change(self.fn), **options)
        fn, in_dims, randomness = self.example
        return replace(per_example(change(fn), in_dims, randomness), ranks=self.ranks)

    def __repr__(self) -> str:
        """Return the name of the function in one line."""
        return f"InstanceWise({getattr(self.fn, '__name__', repr(self.fn))})"


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class MultiTask:
    """An objective `((shared, {name: head_params}), batch) -> {name: loss}` of shared features."""

    trunk: Callable[..., Any]
    heads: Mapping[str, Callable[..., Tensor]]
    has_aux: bool = False
    scale_heads: bool = False

    def __call__(self, params: tuple[Any, Mapping[str, Any]], batch: Any) -> Any:
        """Return the dict of losses (and `aux`, if the trunk has one)."""
        shared, head_params = _check.multitask_params(params, self.heads)
        out = self.trunk(shared, batch)
        features, aux = _check.aux_pair(out) if self.has_aux else (out, None)
        losses = {
            name: head(head_params[name], features, batch) for name, head in self.heads.items()
        }
        return (losses, aux) if self.has_aux else losses

    def __repr__(self) -> str:
        """Return the tasks in one line."""
        return f"MultiTask({', '.join(self.heads)})"


def is_gathered(fn: Callable[..., Any]) -> bool:
    """Say whether an objective has losses on other ranks."""
    return isinstance(fn, InstanceWise) and fn.ranks is not None


def instancewise(
    fn: Callable[..., Any], in_dims: tuple[Any, ...] | None = None, *, check: bool = True
) -> InstanceWise:
    """Declare that loss i of `fn` depends on example i alone.

    Layer-by-layer routes watch `fn` run with this batch and with one example more, to see where
    examples lie, and prove once for each new way that `fn` runs that what they found out is right.
    What is not proven costs one backward pass for each loss, with a warning; it is never wrong.

    Args:
        fn: `fn(params, *batch) -> (b,)`, or `((b,), aux)`. Nothing may mix examples: no batch
            normalisation in training mode.
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
    return InstanceWise(fn, in_dims=in_dims, check=check)


def per_example(
    fn: Callable[..., Any], in_dims: tuple[Any, ...] | None = None, randomness: str = "error"
) -> InstanceWise:
    """Make an objective over a batch from the loss of ONE example.

    Args:
        fn: `fn(params, *example) -> ()`, or `((), aux)`.
        in_dims: As for `torch.func.vmap`, for all arguments, `params` included. By default `params`
            is not batched, and all other arguments are over dimension 0.
        randomness: As for `torch.func.vmap`: `"error"`, `"different"` or `"same"`.

    Returns:
        The instance-wise objective `(params, *batch) -> (b,)`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.per_example(lambda w, x: (x @ w).square())
        >>> objective(torch.ones(2), torch.eye(2))
        tensor([1., 1.])
    """
    _check.choice("randomness", randomness, ("error", "different", "same"))

    example = Example(fn, in_dims, randomness)

    def batched(*args: Any) -> Any:
        """Map the loss of one example over the batch."""
        return vmap(fn, in_dims=example.dims(len(args)), randomness=randomness)(*args)

    return InstanceWise(batched, example)


def multitask(
    trunk: Callable[..., Any],
    heads: Mapping[str, Callable[..., Tensor]],
    *,
    has_aux: bool = False,
    scale_heads: bool = False,
) -> MultiTask:
    """Declare that tasks share features, and nothing else.

    The Jacobian and the Gramian of such an objective are those of the shared parameters, by the
    chain rule through the features, each head traversed once. The gradient of a head is the plain
    gradient of its own loss. A scalarizer sees an ordinary objective: it weighs heads too.
    Whatever a trunk or a head closes over instead of taking as parameters is frozen.

    Args:
        trunk: `trunk(shared, batch) -> features`, a floating tensor or a pytree of such; a task
            need not use all of them.
        heads: `{name: head}` with `head(head_params, features, batch) -> ()`.
        has_aux: Whether the trunk returns `(features, aux)`; the objective then returns
            `(losses, aux)`, and transforms are called with `has_aux=True` as well.
        scale_heads: Whether the gradient of head i is multiplied by weight i too, as if the sum of
            the weighted losses was differentiated. Only for methods with a weighting.

    Returns:
        The objective, called as `objective((shared, {name: head_params}), batch)`; losses come back
        as a dict, and are counted in the order of the sorted names.

    Raises:
        TypeError: If `heads` is not a dict.
        ValueError: If there is no head; from transforms, if a tensor is both shared and in a head.

    Example:
        >>> import torch, torchjd_func as jd
        >>> heads = {"a": lambda p, z, batch: (p * z).sum(), "b": lambda p, z, batch: z.sum()}
        >>> objective = jd.multitask(lambda w, batch: batch @ w, heads)
        >>> params = (torch.ones(2), {"a": torch.tensor(3.0), "b": {}})
        >>> jd.jac(objective)(params, torch.eye(2))
        tensor([[3., 3.],
                [1., 1.]])
    """
    _check.heads(heads)
    return MultiTask(trunk, dict(heads), has_aux, scale_heads)
