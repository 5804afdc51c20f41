"""Operations that torch differentiates wrong, or not under vmap, spelled out in others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchjd_func.differentiate._layerwise import _recurrent
from torchjd_func.differentiate._layerwise._functions import name_of, named
from torchjd_func.differentiate._layerwise._norms import NORMS, norm


def scores_and_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Spell `F.scaled_dot_product_attention` out; torch's fused forms do not vmap (2.13)."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.mT
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if allowed else scores + attn_mask
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights) @ value


def _attention(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Cast as autocast does, of whose casts of a mask no gradient can be taken (torch 2.13)."""
    given: dict[str, Any] = dict(zip(_QUERY, args, strict=False)) | kwargs
    mask, kind = given.get("attn_mask"), given["query"].device.type
    if mask is None or not mask.is_floating_point() or not torch.is_autocast_enabled(kind):
        return func(*args, **kwargs)
    dtype = torch.get_autocast_dtype(kind)
    given |= {name: given[name].to(dtype) for name in _QUERY_TO_MASK}
    with torch.autocast(kind, enabled=False):
        return func(**given)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Spell `F.bilinear` out, which does not vmap (2.13)."""
    out = torch.einsum("...i,kij,...j->...k", input1, weight, input2)
    return out if bias is None else out + bias


def weight_norm(func: Callable[..., Any], v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Spell `torch._weight_norm` out, whose second derivative is wrong (torch 2.13)."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _distances(
    func: Callable[..., Any],
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str | None = None,
) -> Tensor:
    """Spell `torch.cdist` out, whose gradient is wrong under vmap (torch 2.13)."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), ord=p, dim=-1)


def _prelu(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Spell `F.prelu` out where it is mapped, since its gradient is wrong mapped twice (2.13)."""
    # Nowhere else: at 0 torch pushes forward as for positive numbers, and back as for negative.
    given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    if not any(map(_is_mapped, given.values())):
        return func(*args, **kwargs)
    x, weight = given["input"], given["weight"]
    shape = [1] * x.ndim
    if weight.numel() > 1:
        shape[1] = weight.numel()
    return torch.where(x > 0, x, weight.reshape(shape) * x)


def _is_mapped(x: Tensor) -> bool:
    """Say whether a tensor hides a dimension that vmap maps over."""
    if torch.compiler.is_compiling():  # which cannot look
        return True
    inner = torch.func.debug_unwrap(x, recurse=False)
    return inner is not x and (inner.ndim > x.ndim or _is_mapped(inner))


def _embedding(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Divide gradients by counts of indices; torch counts those of all examples (torch 2.13)."""
    given: dict[str, Any] = dict(zip(_EMBEDDING, args, strict=False)) | kwargs
    if not given.get("scale_grad_by_freq") or given["input"].is_floating_point():
        return func(*args, **kwargs)
    index, weight = given["input"], given["weight"]
    given["scale_grad_by_freq"] = False
    out = F.embedding(**given)
    ones = torch.ones_like(index, dtype=weight.dtype).flatten()
    counts = weight.new_zeros(len(weight)).index_add(0, index.flatten(), ones)
    fixed = out.detach()
    return fixed + (out - fixed) / counts[index].unsqueeze(-1)


def _written(func: Callable[..., Any], input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Spell `torch.select_scatter` out, whose gradient is wrong where it is mapped (torch 2.13)."""
    place = index % input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim % input.ndim), dim, place, place + 1)


def _at_index(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Index by a list of one number; a number alone is wrong where it is mapped (torch 2.13)."""
    if _first(args, kwargs).ndim == 0:
        return func(*args, **kwargs)
    listed = [*args[:1], *map(_listed, args[1:])]
    return func(*listed, **{k: x if k == "input" else _listed(x) for k, x in kwargs.items()})


def _listed(x: Any) -> Any:
    """Return a list of a number, and anything else as it is."""
    return x.reshape(1) if isinstance(x, Tensor) and x.ndim == 0 else x


def _moved(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Leave a number where it is; torch moves it to other examples where it is mapped (2.13)."""
    x = _first(args, kwargs)
    return func(*args, **kwargs) if x.ndim else x.clone()


def _unflattened(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Call the function; a compiler cannot trace the method (torch 2.13)."""
    return torch.unflatten(*args, **kwargs)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what an operation is applied to."""
    return args[0] if args else kwargs["input"]


_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
_QUERY_TO_MASK = ("query", "key", "value", "attn_mask")
_QUERY = (*_QUERY_TO_MASK, "dropout_p", "is_causal")
_AT_INDEX = named("index_select index_copy index_copy_ index_add index_add_ index_reduce")
_MAPPED = {
    "scaled_dot_product_attention": scores_and_values,
    "bilinear": bilinear,
}
_BY_FUNCTION: dict[Any, Callable[..., Any]] = {  # these are handed the operation first
    torch.cdist: _distances,
    F.scaled_dot_product_attention: _attention,
    Tensor.unflatten: _unflattened,
    F.embedding: _embedding,
    **dict.fromkeys(named("_weight_norm").functions, weight_norm),
    **dict.fromkeys(NORMS, norm),
    **dict.fromkeys(named("select_scatter").functions, _written),
    **dict.fromkeys(named("prelu").functions, _prelu),
    **dict.fromkeys(_AT_INDEX.functions, _at_index),
    **dict.fromkeys(named("flip roll").functions, _moved),
    **dict.fromkeys(named(" ".join(_recurrent.RECURRENT)).functions, _recurrent.on_device),
    Tensor.data_ptr: _recurrent.address,
    **dict.fromkeys(named("_cudnn_rnn_flatten_weight").functions, _recurrent.unmoved),
}
_SPELLED = _BY_FUNCTION | {name_of(func): spell for func, spell in _BY_FUNCTION.items()}


def spelled(func: Callable[..., Any], mapped: bool) -> Callable[..., Any]:
    """Return a function that torch differentiates right, also if it is mapped over."""
    compiling = torch.compiler.is_compiling()
    name = str(name_of(func)) if compiling or mapped else ""  # torch 2.11: hashable as a text only
    spell = _SPELLED.get(name if compiling else func)
    if mapped and name in _MAPPED:
        return _MAPPED[name]
    return func if spell is None else functools.partial(spell, func)


class Spelled(TorchFunctionMode):
    """Computes what torch mistakes, such as norms of mixed precisions, in other operations."""

    def __init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        return spelled(func, False)(*args, **(kwargs or {}))
