"""Functions of torch by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


class Functions(NamedTuple):
    """A set of functions; a compiler knows some by their names alone (torch 2.13)."""

    functions: frozenset[Callable[..., Any]]
    names: frozenset[str]

    def __contains__(self, func: Any) -> bool:
        """Say whether a function is among these."""
        if torch.compiler.is_compiling():
            return name_of(func) in self.names
        return func in self.functions

    def __or__(self, other: Functions) -> Functions:  # type: ignore[override]
        """Return the functions of both."""
        return Functions(self.functions | other.functions, self.names | other.names)


def named(names: str) -> Functions:
    """Return what goes by these names on `torch`, on its tensors and among layers."""
    homes = (torch, torch.Tensor, F, torch.special, torch.linalg)
    found = {getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)}
    return Functions(frozenset(found), frozenset(names.split()))


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of an operation; in graphs of torch 2.15 a decorated one has lost its own."""
    return getattr(getattr(func, "__wrapped__", func), "__name__", "an operation")


def is_torchs_own(func: Callable[..., Any]) -> bool:
    """Say whether a function is one of torch's, without a state of its own."""
    if isinstance(func, FunctionType):
        return func.__module__.split(".")[0] == "torch"
    return isinstance(func, _BUILTIN)


def is_getter(func: Callable[..., Any] | None) -> bool:
    """Say whether a function reads an attribute."""
    return getattr(func, "__name__", "") == "__get__"


def is_in_place(func: Callable[..., Any]) -> bool:
    """Say whether a function writes to its first argument, by its name."""
    name = name_of(func)
    special = name.endswith("__")
    return name == "__setitem__" or name.startswith("__i") if special else name.endswith("_")


def may_write(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether a function may write to its first argument: by its name, or as it is told."""
    return is_in_place(func) or any(x is True for x in (*args, *kwargs.values()))


_BUILTIN = (
    BuiltinFunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)


def attribute_of(func: Callable[..., Any] | None) -> str:
    """Return the name of the attribute that a getter reads, all of which are called `__get__`."""
    return getattr(getattr(func, "__self__", None), "__name__", "") if is_getter(func) else ""


READERS = named(
    "size dim ndimension numel nelement stride storage_offset is_floating_point is_complex "
    "is_contiguous element_size get_device data_ptr item tolist __len__ __bool__ __format__ "
    "__repr__ __hash__ is_same_size equal allclose _cudnn_rnn_flatten_weight"
)
