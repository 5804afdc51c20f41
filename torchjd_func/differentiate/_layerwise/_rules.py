"""What each operation gives to the gradients of its parameters.

A rule sees the arguments of one operation with one dimension more in front, and the gradient of the
losses by its output likewise: `(e, ...)` for e examples, or `(1, ...)` arguments that all share. It
returns the gradient rows of one parameter, as a form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from torchjd_func.differentiate._layerwise._forms import Dense, Form, Lazy, Lookup, Outer

Arguments = dict[str, Any]
FormOf = Callable[[Arguments, Tensor, tuple[int, ...]], Form]


class Rule(NamedTuple):
    """The gradient of one operation by each of its parameters."""

    name: str
    arguments: tuple[str, ...]  # all arguments, in order
    batched: tuple[str, ...]  # those that carry examples
    forms: dict[str, FormOf]  # parameter -> (arguments, cotangent, shape) -> rows
    anywhere: bool = False  # whether examples may be on any axis but the last ones of the rule


def bind(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments by name."""
    return dict(zip(rule.arguments, args, strict=False)) | kwargs


def supported(rule: Rule, given: Arguments) -> bool:
    """Say whether the options of an operation are those that its rule knows."""
    options = ("sparse", "scale_grad_by_freq", "max_norm", "offsets", "per_sample_weights")
    if any(given.get(name) not in (None, False) for name in options) or given.get("mode") == "max":
        return False
    extra, stride = given.get("output_padding", 0), given.get("stride", 1)
    return max(_tuple(extra, 1)) < min(_tuple(stride, 1)) or max(_tuple(extra, 1)) == 0


# Outer products: linear layers and matrix products


def _linear_weight(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    return Outer(_positions(cotangent, 1), _positions(given["input"], 1), shape)


def _last(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    return Dense(cotangent.flatten(1, -2).sum(1) if cotangent.ndim > 2 else cotangent)


def _right_factor(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """`x @ W`: the row of W is the sum of `x_t s_t^T`."""
    x = given["input"]
    if len(shape) == 1:
        return Dense((cotangent.unsqueeze(-1) * x).flatten(1, -2).sum(1))
    return Outer(_positions(x, 1), _positions(cotangent, 1), shape)


def _left_factor(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """`W @ x`: the row of W is the sum of `s_t x_t^T`, over the columns t."""
    x = given["other"]
    if x.ndim == 2:  # one vector for each example
        return Outer(_positions(cotangent, 1), _positions(x, 1), shape)
    return Outer(_positions(cotangent.mT, 1), _positions(x.mT, 1), shape)


def _bilinear(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """A bilinear layer is a linear layer on the products of its inputs' entries."""
    products = given["input1"].unsqueeze(-1) * given["input2"].unsqueeze(-2)
    return Outer(_positions(cotangent, 1), _positions(products.flatten(-2), 1), shape)


def _positions(x: Tensor, groups: int) -> Tensor:
    """Return `(e, ..., g q)` as `(e, t, g, q)`."""
    return x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)


# Convolutions: outer products of patches and outputs


def _conv_weight(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """A convolution is a linear layer on the patches of its input."""
    return _patches(given["input"], cotangent, shape, given)


def _conv_transpose_weight(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """The input of a transposed convolution meets the patches of its output."""
    return _patches(cotangent, given["input"], shape, given)


def _patches(image: Tensor, maps: Tensor, shape: tuple[int, ...], given: Arguments) -> Form:
    """Return the outer products of the positions of maps, and the patches of an image there."""
    dims, groups = len(shape) - 2, given.get("groups", 1)
    stride, dilation = _tuple(given.get("stride", 1), dims), _tuple(given.get("dilation", 1), dims)
    padding = _padding(given.get("padding", 0), shape[2:], dilation)
    images = F.pad(image.reshape(-1, *image.shape[-dims - 1 :]), padding)
    outputs = maps.reshape(-1, *maps.shape[-dims - 1 :])

    def make() -> Outer:
        """Cut the patches out."""
        cut = _unfold(images, shape[2:], stride, dilation)
        left = outputs.flatten(2).reshape(maps.shape[0], -1, outputs.shape[1], _count(outputs))
        right = cut.reshape(image.shape[0], -1, *cut.shape[1:])
        return Outer(_channels(left, groups), _channels(right, groups), shape)

    def total() -> Tensor:
        """Convolve, as a plain backward pass does."""
        conv = _CONV_GRADS[dims - 1]
        return conv(images, shape, outputs, stride, 0, dilation, groups)

    e, t = max(image.shape[0], maps.shape[0]), outputs.shape[0] // maps.shape[0] * _count(outputs)
    p = shape[1] * math.prod(shape[2:])
    return Lazy(make, total, (e, t, groups, shape[0] // groups, p))


def _unfold(
    images: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Return the patches of images `(n, c, *size)`, as `(n, c kernel, positions)`."""
    dims, cut = len(kernel), images
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        cut = cut.unfold(dim + 2, d * (k - 1) + 1, s)[..., ::d]
    order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return cut.permute(order).flatten(2 + dims).flatten(1, 1 + dims)


def _channels(x: Tensor, groups: int) -> Tensor:
    """Return `(e, k, g c, l)` as `(e, k l, g, c)`."""
    split = x.unflatten(2, (groups, -1)).permute(0, 1, 4, 2, 3)
    return split.flatten(1, 2)


def _count(images: Tensor) -> int:
    """Return how many positions an image has."""
    return math.prod(images.shape[2:])


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number for each dimension."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return the padding before and after each dimension, the last dimension first."""
    if value == "valid":
        value = 0
    if value == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(pad // 2, pad - pad // 2) for pad in both]
    else:
        pairs = [(pad, pad) for pad in _tuple(value, len(kernel))]
    return [pad for pair in reversed(pairs) for pad in pair]


_CONV_GRADS: tuple[Callable[..., Tensor], ...] = (
    conv_grad.conv1d_weight,
    conv_grad.conv2d_weight,
    conv_grad.conv3d_weight,
)


def _channel_bias(dims: int) -> FormOf:
    """Return the rule of the bias of a convolution: sum over all but the channels."""

    def form(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
        summed = cotangent.flatten(-dims).sum(-1)
        return Dense(summed.reshape(summed.shape[0], -1, summed.shape[-1]).sum(1))

    return form


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
    mean, var = (None, None) if training else (given["running_mean"], given["running_var"])
    return F.batch_norm(x.flatten(0, 1), mean, var, training=training, eps=eps).reshape(x.shape)


def _scale(normalize: Callable[[Arguments], Tensor], *, trailing: bool) -> FormOf:
    """Return the rule of the scale of a normalisation."""

    def form(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
        return _summed(cotangent * normalize(given), shape, trailing)

    return form


def _shift(*, trailing: bool) -> FormOf:
    """Return the rule of the shift of a normalisation."""
    return lambda given, cotangent, shape: _summed(cotangent, shape, trailing)


def _summed(field: Tensor, shape: tuple[int, ...], trailing: bool) -> Form:
    """Sum all but the last dimensions, or all but the channels, dimension 2."""
    if trailing:
        return Dense(field.reshape(field.shape[0], -1, *shape).sum(1))
    return Dense(field.flatten(3).sum((1, 3)) if field.ndim > 3 else field.sum(1))


def _norm(
    name: str, arguments: str, normalize: Callable[[Arguments], Tensor], trailing: bool
) -> Rule:
    """Return the rule of a normalisation."""
    forms = {"weight": _scale(normalize, trailing=trailing), "bias": _shift(trailing=trailing)}
    return Rule(name, tuple(arguments.split()), ("input",), forms, trailing)


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = (*_CONV[:5], "output_padding", "groups", "dilation")
_LINEAR = Rule(
    "linear",
    ("input", "weight", "bias"),
    ("input",),
    {"weight": _linear_weight, "bias": _last},
    anywhere=True,
)
_MATMUL = Rule(
    "matmul",
    ("input", "other"),
    ("input", "other"),
    {"other": _right_factor, "input": _left_factor},
)
_EMBEDDING = (
    "input",
    "weight",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)
_BAG = (
    "input",
    "weight",
    "offsets",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "mode",
    "sparse",
    "per_sample_weights",
    "include_last_offset",
    "padding_idx",
)

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: _LINEAR,
    F.bilinear: Rule(
        "bilinear",
        ("input1", "input2", "weight", "bias"),
        ("input1", "input2"),
        {"weight": _bilinear, "bias": _last},
        anywhere=True,
    ),
    F.embedding: Rule("embedding", _EMBEDDING, ("input",), {"weight": _embedding}, anywhere=True),
    F.embedding_bag: Rule("embedding_bag", _BAG, ("input",), {"weight": _embedding_bag}),
    F.layer_norm: _norm(
        "layer_norm", "input normalized_shape weight bias eps", _layer_norm, trailing=True
    ),
    F.rms_norm: _norm("rms_norm", "input normalized_shape weight eps", _rms_norm, trailing=True),
    F.group_norm: _norm(
        "group_norm", "input num_groups weight bias eps", _group_norm, trailing=False
    ),
    F.batch_norm: _norm(
        "batch_norm",
        "input running_mean running_var weight bias training momentum eps",
        _batch_norm,
        trailing=False,
    ),
    **{
        func: Rule("conv", _CONV, ("input",), {"weight": _conv_weight, "bias": _channel_bias(dims)})
        for dims, func in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1)
    },
    **{
        func: Rule(
            "conv_transpose",
            _CONV_TRANSPOSE,
            ("input",),
            {"weight": _conv_transpose_weight, "bias": _channel_bias(dims)},
        )
        for dims, func in enumerate(
            (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), start=1
        )
    },
    **{
        func: _MATMUL
        for func in (torch.matmul, torch.mm, torch.mv, torch.Tensor.matmul, torch.Tensor.mm)
    },
}
