"""Operations without a rule of their own: what they do, and their rows by their own derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from torchjd_func.differentiate._layerwise import _sources
from torchjd_func.differentiate._layerwise._forms import Dense
from torchjd_func.differentiate._layerwise._functions import named
from torchjd_func.differentiate._layerwise._sources import Place, Source


def is_deterministic(func: Callable[..., Any]) -> bool:
    """Say whether `func` is known to compute the same again from the same arguments."""
    return func in _DETERMINISTIC


def is_local(
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    sources: Sequence[tuple[Tensor, Source]],
    axis: int,
    out: Tensor,
) -> bool:
    """Say whether `func` treats the examples on `axis` one by one, with the same parameters."""
    if func in _ELEMENTWISE:
        return all(_aligned(x, source, axis, out) for x, source in sources)
    if axis != 0:
        return False
    expanded = [source.expanded for _, source in sources]
    if func in _JOINS:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return dim % out.ndim != 0 and all(expanded)
    if func is torch.einsum:
        return _einsum_is_local(args) and not any(expanded)
    return func in _EXAMPLEWISE and not any(expanded)


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
    sources = _sources.sources_in(given)
    made = [_sources.build(source, values) for source in sources]
    dims = [0 if x.shape[0] == cotangent.shape[0] else None for x in arrays]
    parts = [x if dim == 0 else x.squeeze(0) for x, dim in zip(arrays, dims, strict=True)]

    def one(cotangent: Tensor, *parts: Tensor) -> Tensor:
        """Return the gradient of one example."""

        def run(value: Tensor) -> Tensor:
            """Run the operation with a value of the chosen parameter."""
            filled = [value if i == chosen else other for i, other in enumerate(made)]
            copies = cotangent.shape[0] if cotangent.ndim else 1
            spread = [
                x.expand(copies, *x.shape[1:]) if source.expanded else x
                for x, source in zip(filled, sources, strict=True)
            ]
            args, kwargs = _fill(given, spread, parts)
            return func(*args, **kwargs)

        out, pullback = torch.func.vjp(run, made[chosen])[:2]
        return pullback(cotangent.to(out.dtype))[0]

    return Dense(vmap(one, in_dims=(0, *dims))(cotangent, *parts))


def run_quietly(run: Callable[..., Any], func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operation for its shapes alone, without drawing random numbers."""
    if func in _DROPOUTS:
        return args[0] if args else kwargs["input"]
    if func in _NOISE:
        return _NOISE[func](*args, **{k: v for k, v in kwargs.items() if k != "generator"})
    if func is F.scaled_dot_product_attention:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        return run(func, **(given | {"dropout_p": 0.0}))
    return run(func, *args, **kwargs)


def _aligned(x: Tensor, source: Source, axis: int, out: Tensor) -> bool:
    """Say whether a parameter is repeated along the examples of an elementwise operation."""
    place = axis - (out.ndim - x.ndim)
    return source.expanded or place < 0 or x.shape[place] == 1


def _einsum_is_local(args: Any) -> bool:
    """Say whether no parameter has the letter of the examples, the first of the output."""
    several = isinstance(args[1], (list, tuple)) and not isinstance(args[1], (Source, Place))
    inputs, output = args[0].replace(" ", "").split("->")
    pairs = zip(inputs.split(","), args[1] if several else args[1:], strict=True)
    return not any(output[0] in letters for letters, x in pairs if isinstance(x, Source))


def _fill(given: Any, sources: Sequence[Tensor], arrays: Sequence[Tensor]) -> Any:
    """Put values in for sources, in order, and arrays in their places."""
    rest = iter(sources)
    return _sources.substitute(
        given, lambda part: arrays[part.number] if isinstance(part, Place) else next(rest)
    )


_ELEMENTWISE = named(
    "add sub subtract mul multiply div divide true_divide rsub pow maximum minimum where lerp "
    "addcmul addcdiv atan2 hypot logaddexp fmod remainder __radd__ __rsub__ __rmul__ __rdiv__ "
    "__rtruediv__ __rpow__ xlogy clamp clip"
)
_JOINS = named("cat concat concatenate")
_EXAMPLEWISE = named("prelu instance_norm addmm")
_DETERMINISTIC = (
    _ELEMENTWISE
    | _JOINS
    | _EXAMPLEWISE
    | _sources.ENTRYWISE
    | named(
        "neg exp log log1p expm1 sqrt rsqrt square abs reciprocal sigmoid tanh relu gelu silu elu "
        "softplus leaky_relu hardtanh softmax log_softmax logsumexp logsigmoid sin cos sum mean "
        "prod amax amin var std norm vector_norm matrix_norm normalize clone detach to float "
        "double half bfloat16 type type_as stack chunk split unbind narrow select __getitem__ "
        "expand expand_as repeat repeat_interleave tile einsum matmul mm bmm mv addmm baddbmm dot "
        "vdot inner outer tensordot kron diag diag_embed diagonal tril triu cumsum cumprod flip "
        "roll gather index_select pad inv inverse solve cholesky matrix_exp _weight_norm linear "
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding "
        "layer_norm rms_norm group_norm bilinear prelu masked_fill"
    )
)
_DROPOUTS = named(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d"
)
_NOISE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.rand: torch.zeros,
    torch.randn: torch.zeros,
    torch.rand_like: torch.zeros_like,
    torch.randn_like: torch.zeros_like,
    torch.bernoulli: torch.zeros_like,
    torch.normal: lambda mean, *rest, **options: torch.zeros_like(mean),
}
