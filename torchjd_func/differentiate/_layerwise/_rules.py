"""What each operation gives to the gradients of its parameters.

A rule sees the arguments of one operation with one dimension more in front, and the gradient of the
losses by its output likewise: `(e, ...)` for e examples, or `(1, ...)` arguments that all share. It
returns the gradient rows of one parameter, as a form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from torchjd_func import _check
from torchjd_func.differentiate._layerwise._convolutions import (
    channel_bias,
    conv_transpose_weight,
    conv_weight,
)
from torchjd_func.differentiate._layerwise._forms import (
    Arguments,
    Dense,
    Form,
    FormOf,
    Lookup,
)
from torchjd_func.differentiate._layerwise._functions import name_of
from torchjd_func.differentiate._layerwise._products import (
    added,
    bilinear,
    last,
    left_factor,
    linear_weight,
    right_factor,
)
from torchjd_func.differentiate._layerwise._rule import (
    Rule,
    anywhere,
    bags,
    batches,
    batches_plus,
    before_last,
    before_weight,
    bind,
    first,
    images_first,
    matrix,
    matrix_plus_row,
    rule,
    vector_or_matrix,
)


def rule_of(func: Callable[..., Any]) -> Rule | None:
    """Return the rule of an operation, if it has one."""
    return _BY_NAME.get(name_of(func)) if torch.compiler.is_compiling() else RULES.get(func)


def check_batch_norm(layout: str, args: Any, kwargs: Any) -> None:
    """Refuse normalisation over examples that are declared independent."""
    given = bind(RULES[F.batch_norm], args, kwargs)
    batch = given.get("training") or given.get("running_mean") is None
    if layout == "batched" and batch:
        must = "treat each example by itself"
        remedy = "Use `model.eval()`, GroupNorm, or leave `jd.instancewise` away."
        got = "batch normalisation in training mode, which mixes examples"
        _check.fail(ValueError, "an instance-wise objective", must, got, remedy)


def _prelu(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """The slope of all entries, or of each channel, is multiplied with the negative ones."""
    field = cotangent * given["input"].clamp(max=0)
    if math.prod(shape) == 1:
        return Dense(field.flatten(1).sum(1).reshape(-1, *shape))
    return _summed(field, shape, trailing=False)


# Tables


def _embedding(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """Add each output's gradient at its index; the padding index learns nothing."""
    index, padding = given["input"], given.get("padding_idx")
    values = cotangent.reshape(cotangent.shape[0], -1, cotangent.shape[-1])
    index = index.reshape(index.shape[0], -1)
    if padding is not None:
        values = torch.where((index == padding % shape[0]).unsqueeze(2), 0, values)
    return Lookup(index, values, shape)


def _embedding_bag(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """Each index of a bag gets the bag's gradient, or its share of it."""
    index, padding = given["input"], given.get("padding_idx")
    kept = index != (shape[0] if padding is None else padding % shape[0])
    share = kept.to(cotangent.dtype)
    if given.get("mode", "mean") == "mean":
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
    values = share.unsqueeze(-1) * cotangent.unsqueeze(-2)
    return Lookup(index.flatten(1), values.flatten(1, -2), shape)


# Normalisation: a scale and a shift of what is normalised without parameters


def _layer_norm(given: Arguments) -> Tensor:
    return F.layer_norm(given["input"], given["normalized_shape"], eps=given.get("eps", 1e-5))


def _rms_norm(given: Arguments) -> Tensor:
    return F.rms_norm(given["input"], given["normalized_shape"], eps=given.get("eps"))


def _group_norm(given: Arguments) -> Tensor:
    x = given["input"]
    normal = F.group_norm(x.flatten(0, 1), given["num_groups"], eps=given.get("eps", 1e-5))
    return normal.reshape(x.shape)


def _batch_norm(given: Arguments) -> Tensor:
    x, training, eps = given["input"], given.get("training", False), given.get("eps", 1e-5)
    if training or given.get("running_mean") is None:  # over the entries of one example
        return vmap(lambda part: F.batch_norm(part, None, None, training=True, eps=eps))(x)
    mean, var = given["running_mean"], given["running_var"]
    return F.batch_norm(x.flatten(0, 1), mean, var, eps=eps).reshape(x.shape)


def _scale(
    normalize: Callable[[Arguments], Tensor],
    trailing: bool,
    given: Arguments,
    cotangent: Tensor,
    shape: tuple[int, ...],
) -> Form:
    return _summed(cotangent * normalize(given), shape, trailing)


def _shift(trailing: bool, given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    return _summed(cotangent, shape, trailing)


def _summed(field: Tensor, shape: tuple[int, ...], trailing: bool) -> Form:
    """Sum all but the last dimensions, or all but the channels, dimension 2."""
    if trailing:
        return Dense(field.reshape(field.shape[0], -1, *shape).sum(1))
    return Dense(field.flatten(3).sum((1, 3)) if field.ndim > 3 else field.sum(1))


def _norm(arguments: str, normalize: Callable[[Arguments], Tensor], *, trailing: bool) -> Rule:
    """Return the rule of a normalisation."""
    forms = {"weight": partial(_scale, normalize, trailing), "bias": partial(_shift, trailing)}
    return rule(arguments, "input", forms, before_weight if trailing else first)


def _images(arguments: str, weight: FormOf, dims: int) -> Rule:
    """Return the rule of a convolution."""
    forms = {"weight": weight, "bias": partial(channel_bias, dims)}
    return rule(arguments, "input", forms, partial(images_first, dims))


_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = "input weight bias stride padding output_padding groups dilation"
_EMBEDDING = "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
_BAG = (
    "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights "
    "include_last_offset padding_idx"
)
_RMS_NORM = _norm("input normalized_shape weight eps", _rms_norm, trailing=True)
_MATMUL = rule(
    "input other",
    "input other",
    {"other": partial(right_factor, "input"), "input": partial(left_factor, "other")},
    vector_or_matrix,
    expanded="input other",
)
_ADDMM = rule(
    "input mat1 mat2 beta alpha",
    "mat1",
    {"input": last, "mat2": partial(right_factor, "mat1")},
    matrix_plus_row,
)
_BMM = rule(
    "input mat2",
    "input mat2",
    {"mat2": partial(right_factor, "input"), "input": partial(left_factor, "mat2")},
    batches,
    expanded="input mat2",
)
_BADDBMM = rule(
    "input batch1 batch2 beta alpha",
    "batch1",
    {"input": added, "batch2": partial(right_factor, "batch1")},
    batches_plus,
    expanded="input batch2",
)
_BILINEAR = rule(
    "input1 input2 weight bias",
    "input1 input2",
    {"weight": bilinear, "bias": last},
    before_last,
)
RULES: dict[Callable[..., Any], Rule] = {
    F.linear: rule("input weight bias", "input", {"weight": linear_weight, "bias": last}, matrix),
    F.bilinear: _BILINEAR,
    F.embedding: rule(_EMBEDDING, "input", {"weight": _embedding}, anywhere),
    F.embedding_bag: rule(_BAG, "input", {"weight": _embedding_bag}, bags),
    F.layer_norm: _norm("input normalized_shape weight bias eps", _layer_norm, trailing=True),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _RMS_NORM),
    F.group_norm: _norm("input num_groups weight bias eps", _group_norm, trailing=False),
    F.batch_norm: _norm(
        "input running_mean running_var weight bias training momentum eps",
        _batch_norm,
        trailing=False,
    ),
    F.conv1d: _images(_CONV, conv_weight, 1),
    F.conv2d: _images(_CONV, conv_weight, 2),
    F.conv3d: _images(_CONV, conv_weight, 3),
    F.conv_transpose1d: _images(_CONV_TRANSPOSE, conv_transpose_weight, 1),
    F.conv_transpose2d: _images(_CONV_TRANSPOSE, conv_transpose_weight, 2),
    F.conv_transpose3d: _images(_CONV_TRANSPOSE, conv_transpose_weight, 3),
    **dict.fromkeys(
        (F.prelu, torch.prelu, Tensor.prelu),
        rule("input weight", "input", {"weight": _prelu}, first),
    ),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _ADDMM),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _BMM),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _BADDBMM),
    **dict.fromkeys((torch.matmul, torch.mm, torch.mv), _MATMUL),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__), _MATMUL),
}
_BY_NAME = {name_of(func): rule for func, rule in RULES.items()}
