"""What a module must not be or hold, for it to become a pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from torchjd_func._check._messages import fail

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


def supported(named_modules: list[tuple[str, nn.Module]]) -> None:
    """Check that each module can run as a pure function."""
    for name, module in named_modules:
        for refuses, rule, remedy in _REFUSED:
            if refuses(module):
                where = f"`model.{name}`" if name else "`model`"
                fail(ValueError, where, rule, type(module).__name__, remedy)


def recurrent(named_modules: list[tuple[str, nn.Module]]) -> list[tuple[str, str]]:
    """Return name and kind of the modules that torch.compile cannot capture (torch 2.13)."""
    return [
        (name, type(module).__name__)
        for name, module in named_modules
        if isinstance(module, nn.RNNBase)
    ]


def capturable(modules: list[tuple[str, str]]) -> None:
    """Check, while a step is compiled, that there are no `recurrent` modules."""
    if modules and torch.compiler.is_compiling():
        name, kind = modules[0]
        where = f"`model.{name}`" if name else "`model`"
        remedy = f"Loop over nn.{kind}Cell, or do not compile the step."
        fail(ValueError, where, "be a module that torch.compile can capture", kind, remedy)


def _wrapped(module: nn.Module) -> bool:
    """Say whether a module distributes another one."""
    return any(kind.__name__ in WRAPPERS for kind in type(module).__mro__)


def _compiled(module: nn.Module) -> bool:
    """Say whether a module was compiled by itself."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _hooked(module: nn.Module) -> bool:
    """Say whether hooks run in the backward pass of a module."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _sparse(module: nn.Module) -> bool:
    """Say whether an embedding has sparse gradients."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


def _renormalised(module: nn.Module) -> bool:
    """Say whether an embedding overwrites its weight in the forward pass."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def _lazy(module: nn.Module) -> bool:
    """Say whether a module does not know its shapes yet."""
    return any(isinstance(param, UninitializedParameter) for param in module._parameters.values())


_REFUSED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        _wrapped,
        "not be a wrapper that distributes a module",
        "Pass model.module, and reduce the Jacobian or the gradients between processes yourself.",
    ),
    (_compiled, "not be compiled by itself", "Pass the original module, and compile the step."),
    (
        _hooked,
        "have no backward hooks, which torch.func does not run",
        "Remove the hooks, and look at what jd.jac or jd.grad returns.",
    ),
    (
        _sparse,
        "have dense gradients (sparse=False)",
        "Make the embedding without sparse=True.",
    ),
    (
        _renormalised,
        "not overwrite its weight (max_norm=None)",
        "Normalise what the embedding returns, or the weight after each step.",
    ),
    (_lazy, "know its shapes", "Run the model once on an example."),
)
