"""Rows of a Jacobian for one parameter, kept as factors, and their inner products.

A form stands for `(e, *shape)` rows, one for each of e examples, that need not be written down.
Products are taken in float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise import _half


class Outer(NamedTuple):
    """Row i is the sum over t of the outer products of `left[i, t]` and `right[i, t]`."""

    left: Tensor  # (e, t, g, q), for g independent groups
    right: Tensor  # (e, t, g, p); either may have e = 1, where all examples share it
    shape: tuple[int, ...]  # of the parameter: g q p numbers


class Lookup(NamedTuple):
    """Row i adds `values[i, t]` at position `indices[i, t]` of a table."""

    indices: Tensor  # (e or 1, t), integers
    values: Tensor  # (e, t, q)
    shape: tuple[int, ...]  # of the table, (v, q)


class Lazy(NamedTuple):
    """Factors that are made when they are wanted, and a shorter way to their sum."""

    make: Callable[[slice], Outer]  # of some of the examples
    total: Callable[[], Tensor]  # () -> (*shape)
    elements: tuple[int, int, int, int, int]  # (e, t, g, q, p) of the factors to come
    at_once: int  # numbers of them that are best made at a time, see `at_once`
    rows: Callable[[], Tensor] | None = None  # () -> (e, *shape), if there is a shorter way


class Mixed(NamedTuple):
    """A table that is looked up, and a matrix that is multiplied with: tied weights."""

    outer: Outer  # in one group
    lookup: Lookup


class Dense(NamedTuple):
    """The rows themselves."""

    rows: Tensor  # (e, *shape)


Form = Outer | Lookup | Lazy | Mixed | Dense
Arguments = dict[str, Any]  # of one operation, by name
FormOf = Callable[[Arguments, Tensor, tuple[int, ...]], Form]  # of them, cotangent and shape


def total(form: Form) -> Tensor:
    """Return the sum of all rows, `(*shape)`."""
    if isinstance(form, Outer):
        left, right = (x.flatten(0, 1).transpose(0, 1) for x in (form.left, form.right))
        return (left.mT @ right).reshape(form.shape)
    if isinstance(form, Lookup):
        zeros = form.values.new_zeros(form.shape)
        return zeros.index_add(0, _positions(form), form.values.flatten(0, 1))
    if isinstance(form, Mixed):
        return total(form.outer) + total(form.lookup)
    return form.total() if isinstance(form, Lazy) else form.rows.sum(0)


def dense(form: Form) -> Tensor:
    """Return the rows, `(e, *shape)`."""
    if isinstance(form, Outer):
        left, right = form.left.permute(0, 2, 3, 1), form.right.permute(0, 2, 1, 3)
        return _half.multiply(left, right).reshape(-1, *form.shape)
    if isinstance(form, Lookup):
        e, t, q = form.values.shape
        index = form.indices.expand(e, t).unsqueeze(2).expand(e, t, q)
        return form.values.new_zeros(e, *form.shape).scatter_add(1, index, form.values)
    if isinstance(form, Lazy):
        if form.rows is not None:
            return form.rows()
        return torch.cat([dense(part) for part in _parts(form)])
    if isinstance(form, Mixed):
        return dense(form.outer) + dense(form.lookup)
    return form.rows


def made(form: Form) -> Form:
    """Return the form with all of its factors made."""
    return form.make(slice(None)) if isinstance(form, Lazy) else form


def outline(form: Form) -> str:
    """Return the kind of a form and the shapes of its parts."""
    parts = [(*x.shape, x.dtype) if isinstance(x, Tensor) else x for x in form if not callable(x)]
    return f"{type(form).__name__}{parts}"


def merged(forms: Sequence[Form]) -> Form | None:
    """Return several uses of one weight as one with more positions, if they are alike."""
    parts = [made(form) for form in forms]
    outers = [form for form in parts if isinstance(form, Outer)]
    lookups = [form for form in parts if isinstance(form, Lookup)]
    shapes = {
        (x.left.shape[0], x.left.shape[2:], x.right.shape[0], x.right.shape[2:]) for x in outers
    }
    if len(shapes) != 1 or len(outers) + len(lookups) < len(parts) or len(lookups) > 1:
        return None
    outer = outers[0]
    if len(outers) > 1:
        left, right = zip(*((form.left, form.right) for form in outers), strict=True)
        outer = Outer(torch.cat(left, 1), torch.cat(right, 1), outer.shape)
    if not lookups:
        return outer
    left, right, _ = outer
    alike = len(left) == len(right) == len(lookups[0].values) and left.shape[2] == 1
    return Mixed(outer, lookups[0]) if alike and outer.shape == lookups[0].shape else None


def cross(a: Form, b: Form) -> Tensor:
    """Return the inner products of the rows of two forms, `(e_a, e_b)`, the cheaper way."""
    if isinstance(a, Mixed) and isinstance(b, Mixed):
        first = _looked_up(a.outer, b.lookup)
        second = first if a is b else _looked_up(b.outer, a.lookup)
        return cross(a.outer, b.outer) + cross(a.lookup, b.lookup) + first + second.mT
    return (_inner if inner_is_cheaper(a, b) else _products)(a, b)


def sizes(form: Form) -> tuple[int, int, int, int, int]:
    """Return `(e, t, g, q, p)` of factors: each row adds t outer products of q by p, g times."""
    if isinstance(form, Outer):
        e, t, g, q = form.left.shape
        return max(e, form.right.shape[0]), t, g, q, form.right.shape[3]
    if isinstance(form, Lookup):
        e, t, q = form.values.shape
        return e, t, 1, q, form.shape[0]
    if isinstance(form, Mixed):
        return sizes(form.outer)
    return (
        form.elements if isinstance(form, Lazy) else (len(form.rows), 0, 1, 1, form.rows[0].numel())
    )


def inner_is_cheaper(a: Form, b: Form) -> bool:
    """Say whether to multiply factors with factors, rather than rows with rows."""
    if isinstance(a, Mixed) and isinstance(b, Mixed):
        return inner_is_cheaper(a.outer, b.outer)
    if type(a) is not type(b) or isinstance(a, Dense):
        return False
    inner, rows = costs(a, b)
    return inner < rows


def held(a: Form, b: Form) -> int:
    """Return how many numbers are held to multiply two forms of one size."""
    e, t, g, q, p = sizes(a)
    return 2 * (e * t) ** 2 * g if inner_is_cheaper(a, b) else e * g * q * p


def costs(a: Form, b: Form) -> tuple[int, int]:
    """Return the costs of factors with factors, and of rows with rows, in multiplications.

    Factors cost `q + p` and two numbers written for each pair of positions. Rows cost `q p` for
    each position and each pair of examples, and are written once.

    Returns:
        Both costs; a number written counts as several multiplications.
    """
    e, t, g, q, p = sizes(a)
    e_b, t_b, *_ = sizes(b)
    pairs = e * t * e_b * t_b * g
    rows, positions = (e, e * t) if a is b else (e + e_b, e * t + e_b * t_b)
    lookup = isinstance(a, Lookup)
    inner = pairs * (q + (1 if lookup else p) + 2 * _WRITE) + (0 if t == t_b == 1 else _CALLS)
    row = rows * g * q * p * _WRITE
    return inner, (positions * g * q * (1 if lookup else p)) + e * e_b * g * q * p + row


_WRITE = 8  # multiplications that take as long as one number written and read again
_CALLS = 2**20  # and as the calls for factors at several positions


def _inner(a: Form, b: Form) -> Tensor:
    """Multiply factors with factors: neither rows nor a Jacobian is written."""
    if isinstance(a, Lazy) and isinstance(b, Lazy):
        first = made(a)
        return _inner(first, first if a is b else made(b))
    if isinstance(a, Lookup) and isinstance(b, Lookup):
        same = _positions(a)[:, None] == _positions(b)[None, :]
        products = _tree.wide(a.values).flatten(0, 1) @ _tree.wide(b.values).flatten(0, 1).mT
        shape = (*a.values.shape[:2], *b.values.shape[:2])
        return torch.where(same, products, 0).reshape(shape).sum((1, 3))
    assert isinstance(a, Outer) and isinstance(b, Outer)
    first = (_rotated(a.left), _rotated(a.right))
    second = first if a is b else (_rotated(b.left), _rotated(b.right))
    if all([x.shape[1] == x.shape[2] == 1 for x in (*first, *second)]):  # one position
        left, right = [x[:, 0, 0] @ y[:, 0, 0].mT for x, y in zip(first, second, strict=True)]
        return left * right
    left, right = map(_pairs, first, second)
    return (left * right).sum((0, 2, 4))


def _looked_up(a: Outer, b: Lookup) -> Tensor:
    """Multiply factors of a matrix with the rows of it that are looked up, `(e_a, e_b)`."""
    index, values = _positions(b), _tree.wide(b.values).flatten(0, 1)
    left, right = (_tree.wide(x).flatten(0, 2) for x in (a.left, a.right))
    products = left.index_select(1, index) * (right @ values.mT)
    return products.reshape(*a.left.shape[:2], *b.values.shape[:2]).sum((1, 3))


def _rotated(x: Tensor) -> Tensor:
    r"""Reflect positions, so that the first is their sum over $\sqrt t$.

    Both factors are reflected, which changes no row. Where positions nearly cancel, as those of two
    near inputs do, what is left is small, and products in float32 keep their digits.

    Returns:
        Factors of the same rows, in float32 or better.
    """
    x, t = _tree.wide(x), x.shape[1]
    if t == 1:
        return x
    mean = x.sum(1) / math.sqrt(t)
    rotated = torch.add(x, (x[:, 0] - mean).unsqueeze(1), alpha=1 / (math.sqrt(t) - 1))
    rotated[:, 0] = mean  # faster than to put them together
    return rotated


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of all positions of `(e, t, g, q)` factors, `(g, e_a, t_a, e_b, t_b)`."""
    first, second = (
        x.flatten(0, 2) if x.shape[2] == 1 else x.permute(2, 0, 1, 3).flatten(1, 2) for x in (a, b)
    )
    return (first @ second.mT).reshape(-1, *a.shape[:2], *b.shape[:2])


def _positions(form: Lookup) -> Tensor:
    """Return the index of each position, `(e t,)`."""
    return form.indices.expand(form.values.shape[:2]).flatten()


def _products(a: Form, b: Form) -> Tensor:
    """Multiply rows with rows."""
    first = _tree.rows(dense(_widened(a)))
    return first @ (first if a is b else _tree.rows(dense(_widened(b)))).mT


def _widened(form: Any) -> Any:
    """Return the form with factors in float32 or better, or such whose products are."""
    if isinstance(form, Lazy):
        return form._replace(make=lambda examples: _widened(form.make(examples)))
    if isinstance(form, Mixed):
        return Mixed(*map(_widened, form))
    if isinstance(form, Outer) and not _half.serves(form.left, form.right):
        return form._replace(left=_tree.wide(form.left), right=_tree.wide(form.right))
    return form._replace(values=_tree.wide(form.values)) if isinstance(form, Lookup) else form


def _parts(form: Lazy) -> list[Outer]:
    """Make the factors of a few examples at a time."""
    e, t, g, _, p = form.elements
    size = max(1, form.at_once // (t * g * p), -(-e // _MOST_PARTS))
    return [form.make(slice(start, start + size)) for start in range(0, e, size)]


def at_once(like: Tensor) -> int:
    """Return how many numbers of factors are best made at a time where a tensor is."""
    return _CACHED_ON_DEVICE if like.is_cuda else _CACHED


# What fits in the cache of a CPU, or is 1 GB on a device, where more parts are more launches.
_CACHED, _CACHED_ON_DEVICE = 2**19, 2**28
_MOST_PARTS = 16  # so that graphs of compiled functions stay small
