"""Multi-head attention, spelled out in operations whose rules are known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Apply = Callable[..., Any]
Given = dict[str, Any]

_PARAMETERS = inspect.signature(F.multi_head_attention_forward).parameters.values()
_NAMES = tuple([x.name for x in _PARAMETERS])
_DEFAULTS = {x.name: None if x.default is x.empty else x.default for x in _PARAMETERS}


def arguments(args: tuple[Any, ...], kwargs: Given) -> Given:
    """Return the arguments of `F.multi_head_attention_forward` by name."""
    return _DEFAULTS | dict(zip(_NAMES, args, strict=False)) | kwargs


def is_plain(given: Given) -> bool:
    """Say whether nothing is appended to keys and values, and they come in batches."""
    appended = ("bias_k", "bias_v", "static_k", "static_v")
    return (
        all(given[name] is None for name in appended)
        and not given["add_zero_attn"]
        and given["query"].ndim == 3
    )


def attention(apply: Apply, given: Given) -> tuple[Tensor, Tensor | None]:
    """Compute multi-head attention of `(t, b, d)` sequences, each operation through `apply`."""
    projected = _project(apply, given)
    q, k, v = (_split(apply, x, given["num_heads"]) for x in projected)
    dropout = given["dropout_p"] if given["training"] else 0.0
    if given["need_weights"]:
        mixed, weights = _explicit(apply, q, k, v, given, dropout)
    else:
        mixed, weights = _fused(apply, q, k, v, given, dropout), None
    rows = apply(torch.flatten, apply(torch.permute, mixed, (2, 0, 1, 3)), 2)
    return apply(F.linear, rows, given["out_proj_weight"], given["out_proj_bias"]), weights


def _project(apply: Apply, given: Given) -> list[Tensor]:
    """Return queries, keys and values."""
    inputs = [given["query"], given["key"], given["value"]]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    weight = None if given["use_separate_proj_weight"] else weight
    if weight is not None and inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        packed = apply(F.linear, inputs[0], weight, bias)
        return list(apply(torch.chunk, packed, 3, -1))
    separate = [given[f"{name}_proj_weight"] for name in "qkv"]
    weights = separate if weight is None else list(apply(torch.chunk, weight, 3))
    biases = [None] * 3 if bias is None else list(apply(torch.chunk, bias, 3))
    trios = zip(inputs, weights, biases, strict=True)
    return [apply(F.linear, x, w, b) for x, w, b in trios]


def _split(apply: Apply, x: Tensor, heads: int) -> Tensor:
    """Return `(t, b, d)` as `(b, heads, t, d / heads)`."""
    t, b, d = x.shape
    return apply(torch.permute, apply(torch.reshape, x, (t, b, heads, d // heads)), (1, 2, 0, 3))


def _explicit(
    apply: Apply, q: Tensor, k: Tensor, v: Tensor, given: Given, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the mixed values and the attention weights."""
    scaled = apply(torch.mul, q, math.sqrt(1.0 / q.shape[-1]))
    scores = apply(torch.matmul, scaled, apply(torch.transpose, k, -2, -1))
    mask = _mask(apply, given, q)
    scores = scores if mask is None else apply(torch.add, scores, mask)
    weights = apply(torch.softmax, scores, -1)
    if dropout > 0.0:
        weights = apply(F.dropout, weights, dropout)
    mean = apply(torch.mean, weights, 1) if given["average_attn_weights"] else weights
    return apply(torch.matmul, weights, v), mean


def _fused(apply: Apply, q: Tensor, k: Tensor, v: Tensor, given: Given, dropout: float) -> Tensor:
    """Return the mixed values."""
    hint = bool(given["is_causal"]) and given["key_padding_mask"] is None
    mask = None if hint else _mask(apply, given, q)
    return apply(F.scaled_dot_product_attention, q, k, v, mask, dropout, hint)


def _mask(apply: Apply, given: Given, q: Tensor) -> Tensor | None:
    """Return what is added to the scores, `(b or 1, heads or 1, t, s)`."""
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if mask is not None:
        shape = (1, 1, *mask.shape) if mask.ndim == 2 else (*q.shape[:2], *mask.shape[1:])
        mask = apply(torch.reshape, _additive(apply, mask, q.dtype), shape)
    if padding is not None:
        shape = (padding.shape[0], 1, 1, padding.shape[1])
        padding = apply(torch.reshape, _additive(apply, padding, q.dtype), shape)
    if mask is None or padding is None:
        return padding if mask is None else mask
    return apply(torch.add, mask, padding)


def _additive(apply: Apply, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add: minus infinity where a boolean mask forbids."""
    if mask.dtype is not torch.bool:
        return apply(torch.Tensor.to, mask, dtype)
    zero = apply(torch.zeros_like, mask, dtype=dtype)
    return apply(torch.where, mask, float("-inf"), zero)
