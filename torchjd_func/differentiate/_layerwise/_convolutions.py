"""The gradient rows of convolutions: outer products of patches and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._forms import (
    Arguments,
    Dense,
    Form,
    Lazy,
    Outer,
    at_once,
)


def conv_weight(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """A convolution is a linear layer on the patches of its input."""
    return _patches(given["input"], cotangent, shape, given)


def conv_transpose_weight(given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """The input of a transposed convolution meets the patches of its output."""
    return _patches(cotangent, given["input"], shape, given)


def _patches(image: Tensor, maps: Tensor, shape: tuple[int, ...], given: Arguments) -> Form:
    """Return the outer products of the positions of maps, and the patches of an image there."""
    dims, groups = len(shape) - 2, given.get("groups", 1)
    stride = per_dim(given.get("stride", 1), dims)
    dilation = per_dim(given.get("dilation", 1), dims)
    before, after = _padding(given.get("padding", 0), shape[2:], dilation)
    around = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
    t = math.prod(maps.shape[1 : -dims - 1]) * math.prod(maps.shape[-dims:])

    def make(examples: slice) -> Outer:
        """Cut the patches out."""
        images, outputs = (x if x.shape[0] == 1 else x[examples] for x in (image, maps))
        padded = F.pad(_images(images, dims), around)
        cut = torch.unflatten(
            _unfold(padded, shape[2:], stride, dilation), 0, (images.shape[0], -1)
        )
        left = outputs.reshape(outputs.shape[0], -1, *outputs.shape[-dims - 1 :]).flatten(3)
        return Outer(_channels(left, groups), _channels(cut, groups), shape)

    def convolve(images: Tensor, outputs: Tensor, copies: int) -> Tensor:
        """Convolve, as a plain backward pass does; padding on both sides alike needs no copy."""
        even = before == after
        images = images if even else F.pad(images, around)
        options = (stride, before if even else 0, dilation, copies * groups)
        return _CONV_GRADS[dims - 1](images, (copies * shape[0], *shape[1:]), outputs, *options)

    def total() -> Tensor:
        return convolve(_images(image, dims), _images(maps, dims), 1)

    def rows() -> Tensor:
        """Convolve, with the channels of each example as groups of their own."""
        e = len(image)
        images, outputs = (
            _tree.wide(x).reshape(e, -1, *x.shape[-dims - 1 :]).transpose(0, 1).flatten(1, 2)
            for x in (image, maps)
        )
        return convolve(images, outputs, e).reshape(e, *shape)

    e, p = max(image.shape[0], maps.shape[0]), shape[1] * math.prod(shape[2:])
    # Torch's kernels for few channels on CPU, and for many groups on GPU, are slower than patches.
    fast = image.device.type == "cpu" and (groups > 1 or shape[1] >= _FEW_CHANNELS)
    by_groups = rows if fast and len(image) == len(maps) else None
    return Lazy(make, total, (e, t, groups, shape[0] // groups, p), at_once(image), by_groups)


_FEW_CHANNELS = 8


def _images(x: Tensor, dims: int) -> Tensor:
    """Return the images of all examples, `(n, c, *size)`."""
    return x.reshape(-1, *x.shape[-dims - 1 :])


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
    split = torch.unflatten(x, 2, (groups, -1)).permute(0, 1, 4, 2, 3)
    return split.flatten(1, 2)


def per_dim(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number for each dimension."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _padding(
    value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding before each dimension, and after each."""
    if value == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(pad // 2 for pad in both), tuple(pad - pad // 2 for pad in both)
    each = per_dim(0 if value == "valid" else value, len(kernel))
    return each, each


_CONV_GRADS: tuple[Callable[..., Tensor], ...] = (
    conv_grad.conv1d_weight,
    conv_grad.conv2d_weight,
    conv_grad.conv3d_weight,
)


def channel_bias(dims: int, given: Arguments, cotangent: Tensor, shape: tuple[int, ...]) -> Form:
    """Sum over all but the channels."""
    summed = cotangent.flatten(-dims).sum(-1)
    return Dense(summed.reshape(summed.shape[0], -1, summed.shape[-1]).sum(1))
