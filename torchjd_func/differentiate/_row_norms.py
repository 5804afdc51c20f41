"""The norms of all gradients, without their inner products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func._precision import full_precision
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._layerwise import jacobian, joined
from torchjd_func.differentiate._linearized import Linearized, rows_of
from torchjd_func.differentiate._pullback import unscaled
from torchjd_func.differentiate._request import Request, Where
from torchjd_func.differentiate._routes import contract, validate
from torchjd_func.differentiate._verb import linearize


def row_norms(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    r"""Transform an objective into the function that returns the norms of the rows of its Jacobian.

    $$\lVert \nabla \ell_i \rVert = \sqrt{G_{ii}}, \qquad i = 1, \dots, m.$$

    For clipping (`jd.clipped_mean`), for sampling by importance, to find outliers. Layer by layer,
    the rows of one layer are there at a time, and no `(m, m)` products are taken: work is linear in
    the number of examples. Otherwise the Jacobian is built; `"product"` takes the diagonal of the
    Gramian.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.
        where: As for `jd.gramian`: norms by these leaves alone.

    Returns:
        `f(*args, present=None, size=None, **kwargs) -> norms`, `(m,)`, in float32 or better;
        `(norms, aux)` with aux. Keyword arguments are as for `jd.jac`; absent losses have norm 0.

    Raises:
        ValueError: If `route`, `argnums` or `chunk_size` is not allowed.

    References:
        I. Goodfellow, Efficient Per-Example Gradient Computations, 2015,
        https://arxiv.org/abs/1510.01799

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.instancewise(lambda w, x: x @ w)
        >>> jd.row_norms(objective)(torch.ones(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    validate(route, chunk_size)
    options = Request(argnums, has_aux, route, chunk_size, where, alone=True)

    def row_norms_fn(*args: Any, **kwargs: Any) -> Any:
        """Return the norms (and aux)."""
        linear = linearize(fn, args, kwargs, options)
        places = tuple(range(len(linear.leaves.paths)))
        with full_precision():
            squares = squared_norms(linear, route, chunk_size, places)
        positive = squares > 0
        norms = torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
        return detached((norms, linear.aux) if has_aux else norms)

    return row_norms_fn


def squared_norms(
    linear: Linearized, route: str, chunk_size: int | None, places: tuple[int, ...]
) -> Tensor:
    """Return the squared norms of the rows of some leaves, `(m,)`."""
    layers = linear.jacobian.layers
    if layers is not None and route in ("auto", "layerwise"):
        own, total = layers._replace(ranks=None), linear.vector.new_zeros(())
        for place in places:  # the rows of one leaf at a time
            rows = unscaled(jacobian(own, place), linear.jacobian.scale)
            total = total + _squares(rows)
        total = total if layers.ranks is None else joined(total, layers.ranks)
    elif route == "product" or linear.shards is not None:
        total = contract(linear, route, chunk_size, (places,)).matrices[0].diagonal()
    else:
        rows = rows_of(linear)
        total = sum((_squares(rows[i]) for i in places[1:]), _squares(rows[places[0]]))
    return total if linear.present is None else torch.where(linear.present, total, 0)


def _squares(rows: Tensor) -> Tensor:
    """Return the squared norms of the rows of one leaf."""
    return _tree.rows(rows).square().sum(1)
