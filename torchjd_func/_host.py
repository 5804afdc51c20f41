"""Plain numbers: what numpy may read, since no derivative, transform or compiler is watching.

A small problem takes less time in numpy than in torch, and on the CPU it may branch on values.
Functions of `(xp, *arrays)` are written once for both, with `xp` the module: numpy or torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

Array = Any  # numpy.ndarray (its types of reductions are too wide to be checked), or Tensor
# Of an operation that waits for the host: Inductor cuts CUDA graphs in two around it.
WAITS = (torch.Tag.cudagraph_unsafe,)


def call(fn: Callable[..., Any], *values: Array, device: Callable[..., Any] | None = None) -> Any:
    """Return `fn(numpy, *arrays)` as tensors if all numbers are plain, else `fn(torch, *tensors)`.

    Args:
        fn: Returns one array, or a tuple of arrays.
        *values: Tensors or arrays of float64 or integers; Python numbers stay what they are.
        device: What a CUDA device does instead, `device(*tensors)`, mapped or not, but without a
            derivative.
    """
    if device is not None and any(isinstance(x, Tensor) and x.is_cuda for x in values):
        return device(*values) if all(map(_constant, values)) else fn(torch, *values)
    known = arrays(*values)
    if known is None:
        return fn(torch, *(tensor(x) if isinstance(x, np.ndarray) else x for x in values))
    with np.errstate(all="ignore"):  # what is not finite propagates silently, as in torch
        found = fn(np, *known)
    return tuple(map(tensor, found)) if isinstance(found, tuple) else tensor(found)


def call_there_and_back(fn: Callable[..., Array], *values: Array) -> Tensor:
    """Do as `call` for one array, with plain numbers of a CUDA device on the host."""
    # There and back takes 0.1 to 0.3 ms, which a hundred launches exceed (seen on an H100). A graph
    # that is captured may not wait for the host, and takes the launches.
    first = next((x for x in values if isinstance(x, Tensor) and x.is_cuda), None)
    if first is None or not all(map(may_wait, values)):
        return call(fn, *values)
    found = call(fn, *(x.cpu() if isinstance(x, Tensor) else x for x in values))
    return found.to(first.device)


def in_numpy(fn: Callable[..., Any], *values: Any) -> Any:
    """Return a tuple of what a function of arrays returns, as tensors on the first one's device."""
    found = fn(*(x.detach().cpu().numpy() if isinstance(x, Tensor) else x for x in values))
    tensors = (torch.from_numpy(np.asarray(x)) for x in found)
    return tuple(x.to(values[0].device) for x in tensors)


def plain(*values: Any) -> bool:
    """Say whether no derivative, transform or compiler is watching tensors."""
    return not torch.compiler.is_compiling() and unwatched(*values)


def unwatched(*values: Any) -> bool:
    """Say whether no derivative or transform is watching tensors; a compiler may."""
    return not any(_watched(x) for x in values if isinstance(x, Tensor))


def _constant(value: Any) -> bool:
    """Say whether nothing but `torch.func.vmap` is watching a value."""
    looks_in = isinstance(value, Tensor) and not torch.compiler.is_compiling()
    return plain(whole_batch(value) if looks_in else value)


def whole_batch(x: Tensor) -> Tensor:
    """Return the batch that a tensor is one of in `torch.func.vmap`, however deep; not compiled."""
    # The wrappers of grad, vjp and jvp have as many dimensions as what they wrap.
    inner = torch.func.debug_unwrap(x, recurse=False)
    while inner is not x and inner.ndim == x.ndim + 1:
        x, inner = inner, torch.func.debug_unwrap(inner, recurse=False)
    return x


def _watched(x: Tensor) -> bool:
    """Say whether a derivative or a transform is watching a tensor."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():  # which guards both, but cannot look into a tensor
        return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    try:  # what is made under a transform is of it, and has no memory (torch 2.13)
        x.detach().untyped_storage()
    except RuntimeError:
        return True
    return forward_ad.unpack_dual(x).tangent is not None


def version_of(x: Tensor) -> int:
    """Return how often a tensor was written to; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def pushed(x: Tensor) -> bool:
    """Say whether the innermost transform pushes a tensor forward."""
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # mapped and pushed forward, it has no rule (torch 2.13)
        return True


def resident(value: Any) -> bool:
    """Say whether a value is no tensor, or one whose memory a kernel may read."""
    if not isinstance(value, Tensor):
        return True
    return type(value) is Tensor and not value.is_meta and plain(value)


def may_wait(value: Any) -> bool:
    """Say whether the host may wait for a value: it has one, and no CUDA graph is captured."""
    on_device = isinstance(value, Tensor) and value.is_cuda
    return resident(value) and not (on_device and torch.cuda.is_current_stream_capturing())


def opaque(operation: Callable[..., Any], body: Callable[..., Any], *values: Any) -> Any:
    """Call an opaque operation; its body, which takes less time, if nothing is watching."""
    return (body if all(map(resident, values)) else operation)(*values)


def operation(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    waits: bool = False,
    broadcasts: bool = False,
) -> Callable[..., Any]:
    """Return an operation without derivatives that is opaque to compilers, and may be mapped.

    Args:
        name: What it is called.
        body: What is computed.
        fake: The same for shapes alone; what is computed is laid out as it says, contiguously.
        waits: Whether it waits for the host.
        broadcasts: Whether leading dimensions may also be 1; otherwise what is not mapped repeats.
    """
    kind, tags = f"torchjd_func::{name}", WAITS if waits else ()
    made: Any = torch.library.custom_op(kind, _contiguous(body), mutates_args=(), tags=tags)
    made.register_fake(fake)
    made.register_vmap(partial(_mapped, made, broadcasts))
    return made


def _contiguous(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose results have no strides of their own, as cuSOLVER's have."""

    @wraps(body)
    def run(*args: Any) -> Any:
        found = body(*args)
        one = isinstance(found, Tensor)
        return found.contiguous() if one else tuple(x.contiguous() for x in found)

    return run


def _mapped(made: Callable[..., Any], broadcasts: bool, info: Any, in_dims: Any, *args: Any) -> Any:
    """Do one larger batch."""
    found = made(*aligned(1 if broadcasts else info.batch_size, in_dims, *args))
    return found, 0 if isinstance(found, Tensor) else (0,) * len(found)


def aligned(size: int, in_dims: Any, *args: Any) -> list[Any]:
    """Bring mapped dimensions to the front; tensors that are not mapped get one of a size."""
    return [
        (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0))
        if isinstance(x, Tensor)
        else x
        for x, dim in zip(args, in_dims, strict=True)
    ]


def arrays(*values: Array) -> list[Array] | None:
    """Return the numbers of all values as arrays, to be read only; `None` unless all are plain."""
    found = []
    for x in values:
        known = numbers(x)
        if known is None:
            return None
        found.append(known)
    return found


def numbers(x: Array) -> Array | None:
    """Return the numbers of `x` as an array, to be read only; `None` unless they are plain."""
    if not isinstance(x, Tensor):
        return x
    if torch.compiler.is_compiling() or not x.is_cpu:
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    try:  # in this order: mapped and pushed forward, it has no rule for unpack_dual (torch 2.13)
        array = x.numpy()
        return array if forward_ad.unpack_dual(x).tangent is None else None
    except (RuntimeError, TypeError):  # mapped by torch.func, a subclass, or bfloat16
        return None


def tensor(x: Array) -> Tensor:
    """Return an array as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))


def to(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype and on the device of another one."""
    return value.to(like, non_blocking=like.is_cuda)  # what is on the host need not wait


def number(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a number as a 0-d tensor in the dtype and on the device of another one."""
    return to(value, like) if isinstance(value, Tensor) else like.new_full((), value)


def constant(x: Array) -> Array:
    """Return `x` as a constant of derivatives."""
    return x.detach() if isinstance(x, Tensor) else x


def filled(x: Array, mask: Array, value: float) -> Array:
    """Return `x` with a number where a mask is true, in one launch."""
    return x.masked_fill(mask, value) if isinstance(x, Tensor) else np.where(mask, value, x)


def argsort(x: Array) -> Array:
    """Return the stable order along the last dimension."""
    if isinstance(x, Tensor):
        return x.argsort(dim=-1, stable=True)
    return x.argsort(axis=-1, kind="stable")


def identity(x: Array) -> Array:
    """Return the identity in the size, dtype and place of a matrix."""
    if isinstance(x, Tensor):
        return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return np.eye(x.shape[-1])
