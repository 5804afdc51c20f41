"""The one form of an error: what must hold, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def message(name: str, rule: str, got: Any, remedy: str) -> str:
    """Return the one kind of message: `name` must <rule>, got <value>. <what to do>."""
    return f"{name} must {rule}, got {got}. {remedy}"


def in_style(text: str) -> bool:
    """Say whether the text of an error is of this kind, and says what to do."""
    return " must " in text and ", got " in text


def fail(kind: type[Exception], name: str, rule: str, got: Any, remedy: str) -> NoReturn:
    """Raise an error with the one kind of message."""
    raise kind(message(name, rule, got, remedy))


def at(name: str, path: str) -> str:
    """Name an argument, or a part of it."""
    return f"`{name}` at {path!r}" if path else f"`{name}`"


def describe(value: Any) -> str:
    """Describe a value that is not what it should be."""
    if isinstance(value, Tensor):
        kind = "meta tensor" if value.is_meta else "tensor"
        kind = kind if value.layout == torch.strided else "sparse tensor"
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return "None" if value is None else type(value).__name__


def holds_numbers(value: Tensor) -> bool:
    """Say whether a tensor has all of its numbers: it is not sparse."""
    return value.layout == torch.strided


def one_device(name: str, leaves: Sequence[Any], paths: Sequence[str] | None = None) -> None:
    """Check that all tensors among `leaves` are on one device."""
    known = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if all([leaf.device == known[0][1].device for _, leaf in known]):
        return  # before any text is made, as below: a call takes microseconds
    devices: dict[str, str] = {}
    for place, leaf in known:
        where = "" if paths is None else f" at {paths[place]!r}"
        devices.setdefault(str(leaf.device), f"{leaf.device}{where}")
    got, remedy = " and ".join(devices.values()), "Move them: x.to(device)."
    fail(ValueError, name, "be on one device", got, remedy)


def differentiable(name: str, paths: Sequence[str], leaves: Sequence[Any], remedy: str) -> None:
    """Check that all leaves are dense floating or complex tensors."""
    for path, leaf in zip(paths, leaves, strict=True):
        floating = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        if floating and holds_numbers(leaf):
            continue
        got = f"{describe(leaf)} at {path!r}" if path else describe(leaf)
        if not floating:
            fail(TypeError, name, "hold floating-point tensors only", got, remedy)
        fail(TypeError, name, "hold dense tensors with numbers", got, "Use .to_dense(), or .to().")
    one_device(name, leaves)


def place(leaf: Tensor) -> tuple[int, int] | None:
    """Return where a tensor lies in memory, or `None` where that is not known or is nowhere."""
    if torch.compiler.is_compiling() or not leaf.numel():
        return None
    try:
        address = leaf.data_ptr()
    except RuntimeError:  # a tensor under torch.func.vmap has no memory of its own
        return None
    return (address, leaf.numel()) if isinstance(address, int) else None  # in an objective
