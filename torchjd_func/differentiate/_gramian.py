"""Gramians of a vector of losses, by several routes that agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._precision import full_precision
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._linearized import Linearized, assemble, value
from torchjd_func.differentiate._request import Request, Where
from torchjd_func.differentiate._routes import contract_cross, contract_whole, validate
from torchjd_func.differentiate._verb import linearize, without_losses
from torchjd_func.differentiate._where import features

PyTree = Any


def gramian(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Gramian `J J^T`.

    | route | cost beside one forward | memory beside the graph | when |
    |---|---|---|---|
    | `"layerwise"`, instance-wise | about one half of a backward | rows of one layer | m examples |
    | `"layerwise"`, else | m backward through activations | m activations | m n does not fit |
    | `"jacobian"` | m backward, m^2 n multiplications | m n | default |
    | `"product"` | m backward, each run forward again | n * chunk_size | nothing else fits |

    All give the same Gramian, from one forward pass (dropout is drawn once; the first call with new
    shapes also runs forward for shapes alone). `"auto"` is `"layerwise"` for an objective of
    `jd.instancewise` or `jd.per_example`, else `"jacobian"`. `"product"` adds up in the precision
    of the objective, the others in float32 or better.

    Layer by layer, what a parameter was applied to, `a`, and the gradient of the losses by the
    result, `s`, are kept. A linear layer adds `sum_{t,u} (a_it . a_ju) (s_it . s_ju)` to entry
    (i, j), or the product of the rows `sum_t s_it a_it^T`, whichever costs less. For e examples at
    t positions, with q outputs and p inputs, that is `(e t)^2 (q + p + 16)` against
    `e t q p + e^2 q p + 8 e q p` multiplications, counting 8 for a number written. A parameter
    on which an unsupported operation is used costs m backward passes for itself alone;
    `jd.explain_gramian` shows which.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: `"auto"`, `"layerwise"`, `"jacobian"` or `"product"`.
        chunk_size: How many rows or columns at a time. `None` is the route's own choice: all for
            `"jacobian"`, one for `"product"`. On `"layerwise"`, for the parameters on which an
            unsupported operation is used: these share their passes.
        where: As for `jd.jac`: the Gramian of these leaves alone.

    Returns:
        `f(*args, present=None, size=None, **kwargs) -> G`, `(m, m)`, in float32 or better;
        `(G, aux)` with aux. Keyword arguments are as for `jd.jac`; rows and columns of absent
        losses are zero.

    Raises:
        ValueError: If `route`, `argnums` or `chunk_size` is not allowed.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.gramian(lambda x: (x.sum(), x.prod()))(torch.tensor([2.0, 3.0]))
        tensor([[ 2.,  5.],
                [ 5., 13.]])
    """
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size, "where": where}
    return without_losses(gramian_and_value(fn, argnums, **options), has_aux)


def gramian_and_value(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns its Gramian and its losses.

    Args:
        fn: As for `jd.jac`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.
        where: As for `jd.gramian`.

    Returns:
        `f(*args, present=None, size=None, **kwargs) -> (G, losses)`; `(G, (losses, aux))` with aux.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.gramian_and_value(lambda x: x.square())(torch.tensor([1.0, 3.0]))
        (tensor([[ 4.,  0.],
                 [ 0., 36.]]), tensor([1., 9.]))
    """
    validate(route, chunk_size)

    options = Request(argnums, has_aux, route, chunk_size, where, alone=True)

    def gramian_and_value_fn(*args: Any, **kwargs: Any) -> Any:
        """Return the Gramian and the losses (and aux)."""
        linear = linearize(fn, args, kwargs, options)
        with full_precision():
            matrix = _like(linear, contract_whole(linear, route, chunk_size)[0])
        return detached((matrix, value(linear, has_aux)))

    return gramian_and_value_fn


def gramian_vjp(
    fn: Callable[..., Any],
    *primals: Any,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
    present: Any = None,
) -> tuple[Any, ...]:
    """Compute losses, Gramian and pullback of an objective, from one forward pass.

    Args:
        fn: As for `jd.jac`.
        *primals: The arguments of `fn`; bind keyword arguments with `functools.partial`.
        argnums: As for `jd.jac`.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.
        where: Predicate of paths: the Gramian of these leaves, a pullback to all.
        present: As for `jd.jac`.

    Returns:
        `(losses, G, vjp_fn)`, and `aux` as a fourth with aux; `vjp_fn(weights)` is `J^T weights`
        for weights `(m,)`, as a pytree like `primals[argnums]`. With `jd.multitask` it returns
        `(J^T weights, head_grads)`, the heads' plain gradients (weighted with `scale_heads`).

    Example:
        >>> import torch, torchjd_func as jd
        >>> x = torch.tensor([1.0, 3.0])
        >>> losses, gramian, vjp_fn = jd.gramian_vjp(lambda x: x.square(), x)
        >>> weights, _ = jd.mgda().weighting(gramian)
        >>> vjp_fn(weights)
        tensor([1.8000, 0.6000])
    """
    validate(route, chunk_size)
    _check.not_features(where is features, "jd.gramian_vjp")
    options = Request(argnums, has_aux, route, chunk_size, where)
    linear = linearize(fn, primals, {"present": present}, options)
    with full_precision():
        matrix, pullback = contract_whole(linear, route, chunk_size)

    def vjp_fn(weights: Tensor) -> PyTree:
        """Return `J^T weights`."""
        vector = detached(_check.vector("weights", weights))
        _check.length("weights", vector, linear.vector.shape[0])
        with full_precision():
            return detached(assemble(linear, pullback(vector), vector))

    result = (*detached((linear.losses, _like(linear, matrix))), vjp_fn)
    return (*result, detached(linear.aux)) if has_aux else result


def cross_gramian(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
    where: Where | None = None,
) -> Callable[..., Any]:
    """Transform an objective into the function that returns `J_1 J_2^T` of two batches.

    Args:
        fn: Objective `fn(params, *batch)`.
        argnums: As for `jd.jac`; names one of the arguments before the batch.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.
        where: As for `jd.gramian`.

    Returns:
        `f(params, batch_1, batch_2, present=None, size=None, **kwargs) -> G`, `(m_1, m_2)`, not
        symmetric in general; each batch is a tuple of arguments of `fn`. `(G, (aux_1, aux_2))` with
        aux.

    Example:
        >>> import torch, torchjd_func as jd
        >>> cross = jd.cross_gramian(lambda w, x: (x @ w).square())
        >>> cross(torch.ones(2), (torch.eye(2),), (2 * torch.eye(2),))
        tensor([[16.,  0.],
                [ 0., 16.]])
    """
    validate(route, chunk_size)

    options = Request(argnums, has_aux, route, chunk_size, where, alone=True)

    def cross_gramian_fn(*args: Any, **kwargs: Any) -> Any:
        """Return the cross-Gramian (and both aux)."""
        leading, batch_1, batch_2 = _check.two_batches(args)
        first = linearize(fn, (*leading, *batch_1), kwargs, options)
        second = linearize(fn, (*leading, *batch_2), kwargs, options)
        with full_precision():
            matrix = _like(first, contract_cross(first, second, route, chunk_size))
        return detached((matrix, (first.aux, second.aux)) if has_aux else matrix)

    return cross_gramian_fn


def _like(linear: Linearized, matrix: Tensor) -> Tensor:
    """Return a Gramian of rows, which is in float64, in the precision of the losses."""
    return matrix.to(_tree.accumulation_dtype(linear.vector.dtype))
