"""Where the examples of a batch lie in each tensor, followed from operation to operation.

A tensor of a batch of b examples has an axis of size b, or, on axis 0, of size b k with the k rows
of an example side by side. Whatever cannot be followed with certainty has the axis `None`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjd_func.differentiate._layerwise._functions import named

Axis = int | None
Follow = Callable[[Tensor, int, tuple[Any, ...], dict[str, Any], Tensor], Axis]


def follow(
    func: Callable[..., Any],
    given: list[tuple[Tensor, Axis]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
    size: int,
) -> Axis:
    """Return the axis of `size` examples in `out`, made by `func` from tensors with known axes."""
    step = _FOLLOW.get(func, _keeps)
    found = [None if a is None else step(t, a, args, kwargs, out) for t, a in given]
    axis = found[0]
    if axis is None or axis >= out.ndim or any(other != axis for other in found):
        return None
    valid = out.shape[axis] == size or (axis == 0 and out.shape[0] % size == 0)
    return axis if valid else None


def _keeps(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow an operation that moves nothing: tensors are aligned at their last dimensions."""
    others = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    if out.ndim > tensor.ndim and any(other.ndim == out.ndim for other in others):
        return axis + out.ndim - tensor.ndim
    return None if out.ndim < tensor.ndim and axis > 0 else axis


def _stays(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow an operation that leaves the first dimensions where they are."""
    return axis


def _lost(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Give up: the operation may put entries anywhere."""
    return None


def _expanded(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `expand`, which puts new dimensions first."""
    return axis + out.ndim - tensor.ndim


def _reshaped(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `reshape`: what lies before the examples must stay, unless they come first."""
    if tensor.shape[: axis + 1] == out.shape[: axis + 1]:
        return axis
    first = axis == 0 and out.ndim > 0 and out.shape[0] > 0
    return 0 if first and max(out.shape[0], tensor.shape[0]) % out.shape[0] == 0 else None


def _swapped(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `transpose(dim0, dim1)`."""
    pair = [dim % tensor.ndim for dim in (*args[1:], *kwargs.values())]
    return {pair[0]: pair[1], pair[1]: pair[0]}.get(axis, axis)


def _permuted(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `permute(*dims)`."""
    given = (*args[1:], *kwargs.values())
    dims = given[0] if isinstance(given[0], (list, tuple)) else given
    return [dim % tensor.ndim for dim in dims].index(axis)


def _moved(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `movedim(source, destination)`."""
    pairs = [dims if isinstance(dims, (list, tuple)) else (dims,) for dims in args[1:]]
    source, destination = [[dim % tensor.ndim for dim in dims] for dims in pairs]
    order = [dim for dim in range(tensor.ndim) if dim not in source]
    for place, dim in sorted(zip(destination, source, strict=True)):
        order.insert(place, dim)
    return order.index(axis)


def _reversed(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `t` and `.T` of a matrix."""
    return tensor.ndim - 1 - axis


def _last_two(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `.mT`."""
    last = tensor.ndim - 1
    return {last: last - 1, last - 1: last}.get(axis, axis)


def _inserted(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow an operation that makes a new dimension."""
    dim = _dim(args, kwargs, 1) % out.ndim
    return axis + 1 if dim <= axis else axis


def _along(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow an operation along one dimension, which loses the examples of that dimension."""
    return None if _dim(args, kwargs, 1) % tensor.ndim == axis else axis


def _divided(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow an operation along the dimension that is the third argument."""
    return None if _dim(args, kwargs, 2) % tensor.ndim == axis else axis


def _removed(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow an operation that takes a dimension away."""
    dim = _dim(args, kwargs, 1) % tensor.ndim
    return None if dim == axis else axis - (dim < axis)


def _reduced(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow a reduction over one or several dimensions."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if given is None or isinstance(given, Tensor):
        return _keeps(tensor, axis, args, kwargs, out) if out.ndim == tensor.ndim else None
    dims = {dim % tensor.ndim for dim in ([given] if isinstance(given, int) else given)}
    if axis in dims:
        return None
    return axis if out.ndim == tensor.ndim else axis - sum(dim < axis for dim in dims)


def _indexed(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow `tensor[key]`: every entry of the key up to the examples must be plain."""
    key = args[1] if isinstance(args[1], tuple) else (args[1],)
    before, dim = 0, 0
    for part in key:
        if part is Ellipsis:
            return axis + before if axis < _rest(tensor, key) else None
        if part is None:
            before += 1
            continue
        if dim == axis:
            return axis + before if part == slice(None) else None
        if not isinstance(part, (int, slice)):
            return None
        before -= isinstance(part, int)
        dim += 1
    return axis + before


def _rest(tensor: Tensor, key: tuple[Any, ...]) -> int:
    """Return the first dimension that the entries after the ellipsis take."""
    after = key[[part is Ellipsis for part in key].index(True) + 1 :]
    return tensor.ndim - sum(part is not None for part in after)


def _multiplied(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow a matrix product: the examples must not be summed over."""
    parts = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    left = parts[0] is tensor
    summed = tensor.ndim - 1 if left or tensor.ndim == 1 else tensor.ndim - 2
    if axis == summed:
        return None
    if not left and axis == tensor.ndim - 1:
        return out.ndim - 1
    return axis + max(0, out.ndim - max(tensor.ndim, 2)) if tensor.ndim > 2 or left else None


def _linear(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow a layer that sums over the last dimension."""
    return None if axis == tensor.ndim - 1 else axis


def _einsum(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Tensor) -> Axis:
    """Follow the letter of the examples."""
    operands = args[1:] if isinstance(args[1], Tensor) else args[1]
    equation = args[0].replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    place = [operand is tensor for operand in operands].index(True)
    found = output.find(inputs.split(",")[place][axis])
    return None if found < 0 else found


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> int:
    """Return the argument `dim`; where it is not one number, 0, where the examples may be."""
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    return dim if isinstance(dim, int) else 0


_TABLE: list[tuple[Follow, str]] = [
    (_reshaped, "reshape view flatten unflatten view_as reshape_as contiguous squeeze"),
    (_swapped, "transpose swapaxes swapdims"),
    (_permuted, "permute"),
    (_moved, "movedim moveaxis"),
    (_reversed, "t"),
    (_last_two, "adjoint"),
    (_inserted, "unsqueeze stack"),
    (_removed, "select unbind"),
    (_expanded, "expand expand_as broadcast_to repeat"),
    (_along, "cat concat concatenate flip sort argsort index_select gather narrow take_along_dim"),
    (_along, "cumsum cumprod softmax log_softmax"),
    (_divided, "split chunk tensor_split topk roll"),
    (_reduced, "sum mean amax amin max min logsumexp var std prod any all argmax argmin"),
    (_multiplied, "matmul mm bmm mv __matmul__"),
    (_linear, "linear bilinear"),
    (_stays, "embedding one_hot"),
    (_einsum, "einsum"),
    (_lost, "as_strided unfold diagonal diag diag_embed kron outer tensordot cdist rot90 tile"),
    (_lost, "repeat_interleave scatter index_put take norm median kthvalue fold meshgrid"),
]
_FOLLOW: dict[Callable[..., Any], Follow] = {
    **{func: step for step, names in _TABLE for func in named(names)},
    torch.Tensor.__getitem__: _indexed,
    torch.Tensor.T.__get__: _reversed,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _last_two,  # type: ignore[attr-defined]
}
