"""The gradient rows of linear layers and of products of matrices: outer products."""

from __future__ import annotations

import math

from torch import Tensor

from torchjd_func.differentiate._layerwise._forms import Arguments, Dense, Form, Outer


def linear_weight(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    return Outer(_positions(cotangent), _positions(given["input"]), shape)


def last(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    return Dense(cotangent.flatten(1, -2).sum(1) if cotangent.ndim > 2 else cotangent)


def right_factor(name: str, given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """`x @ W`, with x under a name: the row of W is the sum of `x_t s_t^T`."""
    x = given[name]
    if len(shape) == 1:
        rows = cotangent.unsqueeze(-1) * x
        return Dense(rows.reshape(rows.shape[0], -1, *shape).sum(1))
    if len(shape) == 3:
        return _batches(x, cotangent, shape)
    return Outer(_positions(x), _positions(cotangent), shape)


def left_factor(name: str, given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """`W @ x`, with x under a name: the row of W is the sum of `s_t x_t^T`, over the columns t."""
    x = given[name]
    if len(shape) == 1:  # a vector for W
        rows = x * (cotangent.unsqueeze(-1) if x.ndim == 2 else cotangent.unsqueeze(-2))
        rows = rows if x.ndim == 2 else rows.sum(-1)
        return Dense(rows.reshape(rows.shape[0], -1, *shape).sum(1))
    if len(shape) == 3:
        return _batches(cotangent.mT, x.mT, shape)
    if x.ndim == 2:  # one vector for each example
        return Outer(_positions(cotangent), _positions(x), shape)
    return Outer(_positions(cotangent.mT), _positions(x.mT), shape)


def _batches(left: Tensor, right: Tensor, shape: tuple[int, ...]) -> Form:
    """Return the outer products of rows `(e, k, t, q)`, of one matrix or of k matrices."""
    if shape[0] == 1:
        return Outer(_positions(left), _positions(right), shape)
    return Outer(left.transpose(1, 2), right.transpose(1, 2), shape)


def added(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """What is added to matrices of examples, and repeated to their shape."""
    rows = cotangent.sum(1)
    size = (*(1,) * (3 - len(shape)), *shape)
    return Dense(rows.sum_to_size((len(rows), *size[1:])).reshape(-1, *shape))


def bilinear(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """A bilinear layer is a linear layer on the products of its inputs' entries."""
    products = given["input1"].unsqueeze(-1) * given["input2"].unsqueeze(-2)
    return Outer(_positions(cotangent), _positions(products.flatten(-2)), shape)


def _positions(x: Tensor) -> Tensor:
    """Return `(e, ..., q)` as `(e, t, 1, q)`."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), 1, x.shape[-1])
