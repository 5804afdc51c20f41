"""Operations without a rule of their own: what they do, and their rows by their own derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func._precision import in_one_precision
from torchjd_func.differentiate._layerwise._forms import Dense
from torchjd_func.differentiate._layerwise._functions import name_of, named
from torchjd_func.differentiate._layerwise._sources import (
    ENTRYWISE,
    Place,
    Source,
    build,
    sources_in,
    substitute,
)
from torchjd_func.differentiate._layerwise._spelled import spelled


def may_be_local(func: Callable[..., Any], batched: bool) -> bool:
    """Say whether `func` treats examples one by one, or the only one, if its arguments are such."""
    if not batched:  # the same again from the same arguments
        return func in _DETERMINISTIC
    return (
        func in ELEMENTWISE or func in _JOINS or func in _EXAMPLEWISE or name_of(func) == "einsum"
    )


def is_local(
    func: Callable[..., Any],
    given: tuple[Any, Any],
    sources: Sequence[tuple[Tensor, Source]],
    arrays: Sequence[tuple[Tensor, int | None]],
    axis: int,
    out: Tensor,
) -> bool:
    """Say whether `func` treats the examples on `axis` one by one, with the same parameters."""
    args, kwargs = given
    expanded = [source.expanded for _, source in sources]
    if func in ELEMENTWISE:
        fits = all(s.expanded or _repeated(x, axis, out) for x, s in sources)
        return fits and all(
            _repeated(x, axis, out) if own is None else own + out.ndim - x.ndim == axis
            for x, own in arrays
        )
    if axis != 0 or any(own for _, own in arrays):
        return False
    if func in _JOINS:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        aligned = all(own == 0 for _, own in arrays)
        return isinstance(dim, int) and dim % out.ndim != 0 and aligned and all(expanded)
    if any(expanded):
        return False
    if name_of(func) == "einsum":
        return _einsum_is_local(args, [own for _, own in arrays])
    if name_of(func) == "instance_norm":
        running = (*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var"))
        return not any(isinstance(x, (Source, Place)) for x in running)
    if name_of(func) == "scaled_dot_product_attention":  # by parameters that are added to scores
        inputs = len(args) > 2 and all(isinstance(x, Place) for x in args[:3])
        return inputs and all(_repeated(x, axis, out) for x, _ in sources)
    return isinstance(args[0], Place) and arrays[args[0].number][1] == axis


def rows(
    func: Callable[..., Any],
    given: tuple[Any, Any],
    arrays: Sequence[Tensor],
    cotangent: Tensor,
    chosen: int,
    values: Sequence[Tensor],
) -> Dense:
    """Return the gradient rows of one parameter, by the derivative of the operation itself.

    Args:
        func: The operation.
        given: Its `(args, kwargs)`, with sources for parameters and places for `arrays`.
        arrays: `(e, ...)`, or `(1, ...)` where all examples share one.
        cotangent: `(e, ...)`.
        chosen: Which of the sources in `given`, counted in order.
        values: Parameter leaves and constants.
    """
    sources = sources_in(given)
    made = [build(source, values) for source in sources]
    made, arrays, (cotangent,) = in_one_precision(made, arrays, [cotangent])
    if func in ELEMENTWISE or name_of(func) == "scaled_dot_product_attention":
        return _broadcast(spelled(func, True), given, arrays, cotangent, chosen, made)
    if func in _JOINS and sources[chosen].expanded:
        return _joined(given, arrays, cotangent, chosen, made)
    dims = [0 if x.shape[0] == cotangent.shape[0] else None for x in arrays]
    parts = [x if dim == 0 else x.squeeze(0) for x, dim in zip(arrays, dims, strict=True)]

    def one(cotangent: Tensor, *parts: Tensor) -> Tensor:
        def run(value: Tensor) -> Tensor:
            filled = [value if i == chosen else other for i, other in enumerate(made)]
            args, kwargs = _fill(given, filled, parts)
            return spelled(func, True)(*args, **kwargs)

        out, pullback = torch.func.vjp(run, made[chosen])[:2]
        return pullback(cotangent.to(out.dtype))[0]

    return Dense(vmap(one, in_dims=(0, *dims))(cotangent, *parts))


def _broadcast(
    func: Callable[..., Any],
    given: tuple[Any, Any],
    arrays: Sequence[Tensor],
    cotangent: Tensor,
    chosen: int,
    made: Sequence[Tensor],
) -> Dense:
    """Return the gradients of a parameter that is repeated for each example."""
    front = (1,) * (cotangent.ndim - 1)
    fields = [x.reshape(x.shape[0], *front[x.ndim - 1 :], *x.shape[1:]) for x in arrays]
    value = made[chosen]
    shape = (len(cotangent), *front[value.ndim :], *value.shape)
    field = cotangent if func in _SUMS and not given[1] else None
    if func in _PRODUCTS and len(fields) == 1:
        field = cotangent * fields[0]
    if field is not None and not field.is_complex():
        return Dense(field.sum_to_size(shape).reshape(-1, *value.shape))

    def run(value: Tensor) -> Tensor:
        filled = [value if i == chosen else other for i, other in enumerate(made)]
        args, kwargs = _fill(given, filled, fields)
        return func(*args, **kwargs)

    out, pullback = torch.func.vjp(run, value.expand(shape))[:2]
    return Dense(pullback(cotangent.to(out.dtype))[0].reshape(-1, *value.shape))


def _joined(
    given: tuple[Any, Any],
    arrays: Sequence[Tensor],
    cotangent: Tensor,
    chosen: int,
    made: Sequence[Tensor],
) -> Dense:
    """Return the part of the gradient where a parameter was joined, repeated for each example."""
    args, kwargs = _fill(given, [*enumerate(made)], [(-1, x[0]) for x in arrays])
    parts = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % made[chosen].ndim
    sizes = [part.shape[dim] for _, part in parts]
    place = [number for number, _ in parts].index(chosen)
    rows = cotangent.narrow(dim + 1, sum(sizes[:place]), sizes[place])
    return Dense(rows.sum(1, keepdim=True))


def _repeated(x: Tensor, axis: int, out: Tensor) -> bool:
    """Say whether a tensor is repeated along the examples of an elementwise operation."""
    place = axis - (out.ndim - x.ndim)
    return place < 0 or x.shape[place] == 1


def _einsum_is_local(args: Any, axes: Sequence[int | None]) -> bool:
    """Say whether just the arrays have the letter of the examples, the first of the output."""
    several = isinstance(args[1], (list, tuple)) and not isinstance(args[1], (Source, Place))
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    if "." in equation or "->" not in equation:
        return False
    inputs, output = equation.split("->")
    pairs = zip(inputs.split(","), args[1] if several else args[1:], strict=True)
    return all(
        (axes[x.number] == 0 and letters[0] == output[0] and letters.count(output[0]) == 1)
        if isinstance(x, Place) and axes[x.number] is not None
        else output[0] not in letters
        for letters, x in pairs
    )


def _fill(given: Any, sources: Sequence[Any], arrays: Sequence[Any]) -> Any:
    """Put values in for sources, in order, and arrays in their places."""
    rest = iter(sources)
    return substitute(
        given, lambda part: arrays[part.number] if isinstance(part, Place) else next(rest)
    )


ELEMENTWISE = named(
    "add sub subtract mul multiply div divide true_divide rsub pow maximum minimum where lerp "
    "addcmul addcdiv atan2 hypot logaddexp fmod remainder __radd__ __rsub__ __rmul__ __rdiv__ "
    "__rtruediv__ __rpow__ xlogy clamp clip"
)
# By the names of the same in place: `x.add_(y)` writes `torch.add(x, y)` to x
IN_PLACE = {
    f"{name}_": getattr(Tensor, name) for name in ELEMENTWISE.names if hasattr(Tensor, f"{name}_")
}
_SUMS, _PRODUCTS = named("add __radd__"), named("mul multiply __rmul__")
_JOINS = named("cat concat concatenate")
_EXAMPLEWISE = named("instance_norm scaled_dot_product_attention")
_DETERMINISTIC = (
    ELEMENTWISE
    | _JOINS
    | _EXAMPLEWISE
    | ENTRYWISE
    | named(
        "neg exp log log1p expm1 sqrt rsqrt square abs reciprocal sigmoid tanh relu gelu silu elu "
        "softplus leaky_relu hardtanh softmax log_softmax logsumexp logsigmoid sin cos sum mean "
        "prod amax amin var std norm vector_norm matrix_norm normalize type type_as stack chunk "
        "split unbind narrow select __getitem__ expand expand_as repeat repeat_interleave tile "
        "einsum matmul mm bmm mv addmm baddbmm dot vdot inner outer tensordot kron diag diag_embed "
        "diagonal tril triu cumsum cumprod flip roll gather index_select pad inv inverse solve "
        "cholesky matrix_exp _weight_norm linear conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d embedding layer_norm rms_norm group_norm bilinear prelu "
        "masked_fill"
    )
)
