"""A batch too large for memory, in microbatches: Jacobians add up, Gramians do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._objectives import InstanceWise
from torchjd_func.differentiate._shards import Sharded

PyTree = Any


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Accumulated:
    """An objective whose losses are the means over microbatches of the losses of `fn`."""

    fn: Callable[..., Any]
    n: int
    in_dims: tuple[int | None, ...] | None
    has_aux: bool
    chunk_size: int | None

    def __call__(self, *args: Any) -> Any:
        """Return the mean losses (and the stacked `aux`)."""
        outs = [self.fn(*part) for part in self.split(args)]
        if not self.has_aux:
            return _tree.mean(outs)
        losses, aux = zip(*map(_check.aux_pair, outs), strict=True)
        return _tree.mean(list(losses)), _tree.stack(list(aux))

    def split(self, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return the arguments of each microbatch."""
        dims = (None, *[0] * (len(args) - 1)) if self.in_dims is None else self.in_dims
        _check.in_dims(dims, len(args))
        parts = [_chunks(arg, dim, self.n) for arg, dim in zip(args, dims, strict=True)]
        return list(zip(*parts, strict=True))

    def __repr__(self) -> str:
        """Return the inner objective in one line."""
        return f"Accumulated({getattr(self.fn, '__name__', repr(self.fn))}, {self.n})"


def accumulate(
    fn: Callable[..., Any],
    n: int,
    in_dims: tuple[int | None, ...] | None = None,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Accumulated:
    r"""Make an objective that goes through a batch in `n` microbatches, one graph at a time.

    $$\ell(\theta) = \frac1n \sum_{k=1}^n \ell^{(k)}(\theta), \qquad
    J = \frac1n \sum_{k=1}^n J^{(k)}.$$

    Transforms differentiate each microbatch before the next one runs: memory is the Jacobian and
    the graph of ONE microbatch (in eager mode; a compiler orders the work as it likes). Jacobians
    add up and Gramians do not, so Gramians are taken of the sum. A scalarizer, which weighs losses
    that are known at the end only, sees one ordinary objective, without saving memory.

    If the Jacobian does not fit either, use two passes: weights from the Gramian in blocks,
    $G = n^{-2} \sum_{k, l} J^{(k)} J^{(l)\top}$, then the gradient of the weighted losses:

        cross = jd.cross_gramian(objective)
        gramian = sum(cross(params, x, y) for x in batches for y in batches) / len(batches) ** 2
        weights, state = jd.upgrad().weighting(gramian, state)
        total = jd.accumulate(lambda params, x: objective(params, x) @ weights, n)
        grads, _ = jd.grad(total, jd.sum())(None, params, batch)

    Args:
        fn: `fn(params, *batch)`, whose losses are means over the batch, or an objective of
            `jd.multitask`. Not one of `jd.instancewise`, whose losses are not added up.
        n: Number of microbatches; it must divide the batch, so that the mean of means is the mean.
        in_dims: As for `torch.func.vmap`, for all arguments; `None` for one that all microbatches
            share. By default the first is shared, and the batch is dimension 0 of all others.
        has_aux: Whether `fn` returns `(losses, aux)`; `aux` gains a first dimension of size `n`.
        chunk_size: As for `jd.jac`: how many rows of a microbatch to compute at a time.

    Returns:
        The objective, with the arguments of `fn`.

    Raises:
        TypeError: If `fn` is instance-wise, or what is split is not a tensor.
        ValueError: If `n` does not divide the batch, or `in_dims` does not fit the arguments; from
            transforms, with `route="layerwise"`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.accumulate(lambda w, x: (x @ w).square().mean(), n=2)
        >>> jd.jac(objective)(torch.ones(2), torch.eye(2))
        tensor([[1., 1.]])
    """
    _check.integer("n", n)
    _check.chunk_size(chunk_size)
    _check.not_instancewise("jd.accumulate", fn, InstanceWise)
    _check.plain("jd.accumulate", fn, (Sharded,), "Make chunk_size smaller instead.")
    return Accumulated(fn, n, in_dims, has_aux, chunk_size)


def _chunks(arg: PyTree, dim: int | None, n: int) -> list[PyTree]:
    """Return one argument for each microbatch."""
    if dim is None:
        return [arg] * n
    leaves, rebuild = _tree.flatten(arg)
    parts = [_chunk(leaf, dim, n) for leaf in leaves]
    return [rebuild([part[k] for part in parts]) for k in range(n)]


def _chunk(leaf: Tensor, dim: int, n: int) -> tuple[Tensor, ...]:
    """Cut one tensor into equal parts."""
    _check.divisible(leaf, dim, n)
    return leaf.chunk(n, dim)
