"""What a rule launches on a CUDA device, counted without one: fake tensors that say they are there.

A view launches nothing, an operation of torch one kernel, an operation of ours what its body does.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchjd_func as jd

OURS = {
    "nnqp": 2,
    "eigh": 1,
    "orthant_root": 3,
    "cagrad": 2,
    "threefry": 1,
    "pcgrad": 1,
    "gradvac": 1,
    "inverse": 1,
}
NOTHING = ("_unsafe_view", "lift_fresh", "device", "promote_types")
# Of torch, those that wait for the host.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_linalg_eigh",
    "_linalg_svd",
    "lp_vertex",
)


class Counter(TorchDispatchMode):
    """Counts launches, and keeps the names of what waits."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    @property
    def launches(self) -> int:
        return sum(OURS.get(name, 1) for name in self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITING or _copies(name, args, kwargs or {}, result):
            self.waits.append(name)
        if not (func.is_view or "empty" in name or name in NOTHING):
            self.names.append(name)
        return result


def _copies(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    """Say whether an operation copies between devices, and waits for that."""
    if name not in ("_to_copy", "copy_"):
        return False
    places = [x.device.type for x in (*args, result) if isinstance(x, Tensor)]
    onto = places[-1] == "cuda" and (kwargs.get("non_blocking") or True in args[2:])
    return len(set(places)) > 1 and not onto


class _Methods(TorchFunctionMode):
    """Some methods of fake tensors ask for the device's library; taken apart, they do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return _item(*args)
        if func is Tensor.__invert__:
            return args[0].bitwise_not()
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone()
        return func(*args, **(kwargs or {}))


def _item(x: Tensor, index: Any) -> Tensor:
    """Index by slices, numbers, new dimensions and tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    dim, found = 0, x
    for part in parts:
        if part is Ellipsis:
            dim += x.ndim - used
        elif part is None:
            found, dim = found.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            start, stop, step = part.indices(found.shape[dim])
            found = torch.ops.aten.slice(found, dim, start, stop, step)
            dim += 1
        elif isinstance(part, int):
            found = found.select(dim, part)
        else:
            assert part.dtype == torch.int64
            found, dim = (
                found.index_select(dim, part.reshape(-1)).unflatten(dim, part.shape),
                dim + 1,
            )
    return found


@contextmanager
def counted() -> Generator[Counter]:
    """Count launches on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Methods(), Counter() as counter:
        yield counter


def count(method: Any, m: int, *, weights: bool, dtype: torch.dtype = torch.float64) -> Counter:
    """Count what the second of two calls of a rule launches."""
    with FakeTensorMode(), _Methods():
        rows = torch.empty(m, 10, device="cuda", dtype=dtype)
        losses = torch.empty(m, device="cuda") if method.needs_losses else None
        with torch.device("cuda"):
            aggregator = method.make(m)
        key = jd.random.key(0, device="cuda") if method.random else None
        rule, statistic = aggregator, rows
        if weights:
            rule, statistic = aggregator.weighting, torch.empty(m, m, device="cuda", dtype=dtype)
        state = rule.init(statistic, key=key)
        with Counter() as counter:
            rule(statistic, state, losses=losses)
        return counter
