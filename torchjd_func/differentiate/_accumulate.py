"""A batch too large for memory, in microbatches: Jacobians add up, Gramians do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._instancewise import InstanceWise, batched_dim
from torchjd_func.differentiate._linearized import Jacobian, Linearized, Seen, rows_of
from torchjd_func.differentiate._objective import (
    Function,
    Objective,
    as_objective,
    linearize_whole,
    shown,
)
from torchjd_func.differentiate._request import Request, chosen
from torchjd_func.differentiate._where import features

PyTree = Any
Part = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one microbatch


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Accumulated:
    """An objective whose losses are the means over microbatches of the losses of `fn`."""

    fn: Objective
    n: int
    in_dims: tuple[int | None, ...] | None
    has_aux: bool
    chunk_size: int | None
    carry_aux: int | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mean losses (and the stacked `aux`, or the last, if it is carried)."""
        outs, aux = [], None
        for given, named in self.split(args, kwargs):
            out = self.fn(*self.carried(given, aux), **named)
            aux = _check.aux_pair(out)[1] if self.has_aux else None
            outs.append(out)
        if not self.has_aux:
            _check.losses(_tree.paths(outs[0]), _tree.leaves(outs[0]))
            return _tree.mean(outs)
        losses, parts = zip(*outs, strict=True)
        return _tree.mean(list(losses)), self.joined(list(parts))

    def linearize(self, request: Request) -> Linearized:
        """Differentiate one microbatch after the other, and keep the sum of the Jacobians."""
        _check.same_aux("jd.accumulate", request.has_aux, self.has_aux)
        # A scalarizer weighs losses when all are known: by one graph of all, or by known rows.
        if not request.rows and not self.fn.spans_processes:
            return linearize_whole(self, request)
        return _linearize(self, request)

    def split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Part]:
        """Return the arguments of each microbatch."""
        dims = (None, *[0] * (len(args) - 1)) if self.in_dims is None else self.in_dims
        if self.in_dims is not None or not kwargs:
            _check.in_dims(dims, len(args))
        dims = [None if i == self.carry_aux else dim for i, dim in enumerate(dims)]
        parts = [_chunks(arg, dim, self.n) for arg, dim in zip(args, dims, strict=True)]
        named = {name: _chunks(x, batched_dim(x), self.n) for name, x in kwargs.items()}
        return [
            (tuple(part[k] for part in parts), {name: part[k] for name, part in named.items()})
            for k in range(self.n)
        ]

    def carried(self, args: tuple[Any, ...], aux: PyTree) -> tuple[Any, ...]:
        """Return the arguments of a microbatch, with what the last one handed on."""
        if self.carry_aux is None or aux is None:
            return args
        return (*args[: self.carry_aux], aux, *args[self.carry_aux + 1 :])

    def joined(self, aux: list[PyTree]) -> PyTree:
        """Return the auxiliary output of all microbatches."""
        if self.carry_aux is not None:
            return aux[-1]
        _check.tensors("aux", _tree.paths(aux[0]), _tree.leaves(aux[0]))
        return _tree.stack(aux)

    def wrap(self, change: Callable[[Function], Function]) -> Accumulated:
        """Return the accumulated objective of the changed function."""
        return replace(self, fn=as_objective(self.fn.wrap(change)))

    def rows_like(self, primals: PyTree, m: int) -> PyTree:
        return self.fn.rows_like(primals, m)

    def plan(self, request: Request) -> None:
        """Remember nothing."""

    @property
    def spans_processes(self) -> bool:
        return self.fn.spans_processes

    def __repr__(self) -> str:
        return f"Accumulated({shown(self.fn)}, {self.n})"


def _linearize(fn: Accumulated, request: Request) -> Linearized:
    """Add the rows of all microbatches, each of whose graphs is freed before the next."""
    by_leaves = None if request.where is features else request.where
    asked = request._replace(
        chunk_size=fn.chunk_size or request.chunk_size,
        where=request.where if request.alone or by_leaves is None else None,
    )
    parts, total, aux = [], None, None
    for args, kwargs in fn.split(request.args, request.kwargs):
        part, rows = _microbatch(fn.fn, asked._replace(args=fn.carried(args, aux), kwargs=kwargs))
        total = rows if total is None else [a + b for a, b in zip(total, rows, strict=True)]
        aux = part.aux
        parts.append(part)
    jacobian = [leaf / fn.n for leaf in total or ()]
    first = parts[0]
    heads = first.heads
    if heads is not None:
        heads = heads._replace(rows=_tree.mean([part.heads.rows for part in parts]))
    if request.where is features:  # those of each microbatch are other numbers
        seen = Seen(rows=[leaf / fn.n for part in parts for leaf in part.seen.rows])
    else:
        seen = None
        if by_leaves is not None and not request.alone:
            seen = Seen(chosen(by_leaves, first.leaves.paths))
    return first._replace(
        losses=_tree.mean([part.losses for part in parts]),
        aux=fn.joined([part.aux for part in parts]) if fn.has_aux else (),
        vector=_tree.mean([part.vector for part in parts]),
        jacobian=Jacobian(partial(_tree.weighted_sum, jacobian), lambda: jacobian, known=True),
        seen=seen,
        heads=heads,
    )


def _microbatch(fn: Objective, request: Request) -> tuple[Linearized, list[Tensor]]:
    """Return what is kept of a microbatch, and its Jacobian; the graph is freed on return."""
    part = fn.linearize(request)
    return part._replace(jacobian=Jacobian(_freed, _freed)), rows_of(part)


def _freed(*cotangent: Tensor) -> list[Tensor]:
    """Stand for the pullback of a graph that is gone."""
    raise AssertionError(cotangent)


def accumulate(
    fn: Callable[..., Any],
    n: int,
    in_dims: tuple[int | None, ...] | None = None,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    carry_aux: int | None = None,
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
        carry_aux: Which positional argument each microbatch hands on to the next as its `aux`, such
            as the buffers of a BatchNorm; the `aux` of the last one comes back.

    Returns:
        The objective, with the arguments of `fn`.

    Raises:
        TypeError: If `fn` is instance-wise, or what is split is not a tensor.
        ValueError: If `n` does not divide the batch, `in_dims` does not fit the arguments, or
            `carry_aux` is set without `has_aux`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.accumulate(lambda w, x: (x @ w).square().mean(), n=2)
        >>> jd.jac(objective)(torch.ones(2), torch.eye(2))
        tensor([[1., 1.]])
    """
    _check.integer("n", n)
    _check.chunk_size(chunk_size)
    _check.not_instancewise("jd.accumulate", fn, InstanceWise)
    _check.carry_aux(carry_aux, _check.flag("has_aux", has_aux))
    if in_dims is not None:
        _check.in_dims(in_dims)
    return Accumulated(as_objective(fn), n, in_dims, has_aux, chunk_size, carry_aux)


def _chunks(arg: PyTree, dim: int | None, n: int) -> list[PyTree]:
    """Return one argument for each microbatch."""
    if dim is None or not _tree.leaves(arg):
        return [arg] * n
    return _tree.cut(partial(_chunk, dim=dim, n=n), arg)


def _chunk(leaf: Tensor, *, dim: int, n: int) -> tuple[Tensor, ...]:
    """Cut one tensor into equal parts."""
    _check.divisible(leaf, dim, n)
    return leaf.chunk(n, dim)
