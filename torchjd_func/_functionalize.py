"""A module as a pure function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from torchjd_func import _check

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Apply:
    """A module as a function; torch.compile looks at the fields one by one, the names first."""

    recurrent: list[tuple[str, str]]
    model: nn.Module

    def __call__(
        self, params: Tensors, buffers: Tensors, /, *inputs: Any, **kwargs: Any
    ) -> tuple[Any, Tensors]:
        """Run the module on copies of the buffers, which it may overwrite."""
        _check.capturable(self.recurrent)
        _check.names("params", params, [name for name, _ in self.model.named_parameters()])
        _check.names("buffers", buffers, [name for name, _ in self.model.named_buffers()])
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        outputs = functional_call(self.model, (params, fresh), inputs, kwargs, strict=True)
        return outputs, fresh

    def __repr__(self) -> str:
        """Return the kind of the module in one line."""
        return f"Apply({type(self.model).__name__})"


def functionalize(model: nn.Module) -> tuple[Callable[..., Any], Tensors, Tensors]:
    """Turn a module into a pure function, its parameters and its buffers.

    Args:
        model: Any module. Whether it trains or evaluates is read at each call of `apply`.

    Returns:
        `(apply, params, buffers)`. `apply(params, buffers, *inputs, **kwargs)` returns
        `(outputs, buffers)` and changes nothing: running statistics come back as new buffers.
        `params` and `buffers` are dicts of detached tensors that share memory with the module;
        a tied weight is listed once, under its first name.

    Raises:
        ValueError: If the model or a part of it is compiled, wrapped for several processes, lazy,
            has backward hooks, or is an embedding with `sparse` or `max_norm`. From `apply`, if a
            name is unknown or missing, or torch.compile meets an `nn.RNN`, `nn.LSTM` or `nn.GRU`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> apply, params, buffers = jd.functionalize(torch.nn.Linear(2, 1))
        >>> outputs, buffers = apply(params, buffers, torch.ones(3, 2))
        >>> sorted(params), tuple(outputs.shape)
        (['bias', 'weight'], (3, 1))
    """
    named_modules = list(model.named_modules())
    _check.supported(named_modules)
    params = {name: param.detach() for name, param in model.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    return Apply(_check.recurrent(named_modules), model), params, buffers
