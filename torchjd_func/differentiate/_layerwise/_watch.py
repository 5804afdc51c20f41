"""Follow parameters through the operations of an objective.

Each recognised use gets a zero added to its output, so that the gradient by this zero is the
gradient of the losses by the output. The parameters themselves are constants, and need no gradient.
The run is watched twice: first for shapes (`_scout`), then, inside `torch.func.vjp`, for values
(`_record`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchjd_func.differentiate._layerwise import _attention, _sources
from torchjd_func.differentiate._layerwise._sources import Place, Source, tensors_in

Axis = int | None


class Layout(NamedTuple):
    """How the objective treats examples."""

    kind: str  # "shared": no examples; "batched": along axes; "vmapped": under vmap, none visible
    size: int  # how many examples there are


class Step(NamedTuple):
    """What becomes of one operation on parameters."""

    func: Callable[..., Any]
    use: bool  # recognised: its output is perturbed
    derives: bool  # its output is again a function of parameters alone
    axis: Axis = 0  # where the examples of the output lie
    axes: tuple[Axis, ...] = ()  # where those of the arrays lie; None for what all share
    shape: torch.Size = torch.Size()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class Plan(NamedTuple):
    """What the first run found."""

    layout: Layout
    steps: tuple[Step, ...]
    opaque: frozenset[int]  # leaves that are used where no rule applies
    blind: bool  # some operation was not seen, as it may be when compiling: trust no rule
    reasons: dict[int, str]  # the operation without a rule, of some of the opaque leaves


class Use(NamedTuple):
    """One recognised operation: its arguments, with sources for parameters, places for the rest."""

    step: Step
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arrays: list[Tensor]  # what lies at the places


class Watch(TorchFunctionMode):
    """Follows parameters through the operations of an objective."""

    def __init__(self, handles: Sequence[Tensor], layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.count = len(handles)
        self.constants: list[Tensor] = []
        self.sources = {handle: _sources.of_leaf(i) for i, handle in enumerate(handles)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and remember it if it uses parameters."""
        if func is Tensor.unflatten:  # cannot be traced (torch 2.13)
            func = torch.unflatten
        return self.apply(func, *args, **(kwargs or {}))

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation."""
        given = tensors_in((args, kwargs))
        if func is F.batch_norm:
            self.check_batch_norm(args, kwargs)
        if not any(tensor in self.sources for tensor in given):
            return self.other(func, args, kwargs, given)
        if func is F.multi_head_attention_forward:
            spelled = _attention.arguments(args, kwargs)
            if _attention.is_plain(spelled):
                return _attention.attention(self.apply, spelled)
        return self.on_parameters(func, args, kwargs, given)

    def other(self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run an operation without parameters."""
        return self.run(func, *args, **kwargs)

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation, spelled out if it will be mapped over and torch cannot."""
        mapped = self.layout.kind != "batched"
        return (_attention.SPELLED.get(func, func) if mapped else func)(*args, **kwargs)

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Run an operation with parameters."""
        raise AssertionError

    def check_batch_norm(self, args: Any, kwargs: Any) -> None:
        """Refuse normalisation over examples that are declared independent."""

    def mark(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[Tensor]]:
        """Return the arguments with sources and places for tensors, and the tensors there."""
        arrays: list[Tensor] = []

        def replace(x: Tensor) -> Any:
            """Name one tensor."""
            if x in self.sources:
                return self.sources[x]
            arrays.append(x)
            return Place(len(arrays) - 1)

        return (*_sources.substitute((args, kwargs), replace), arrays)

    def derived(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Remember a function of parameters and constants alone."""

        def replace(x: Tensor) -> Source:
            """Name one tensor."""
            if x in self.sources:
                return self.sources[x]
            self.constants.append(x)
            return _sources.of_constant(self.count + len(self.constants) - 1)

        given = _sources.substitute((args, kwargs), replace)
        size = self.layout.size if self.layout.kind == "batched" else None
        source = _sources.derive(func, given[0], given[1], size)
        if isinstance(out, Tensor):
            self.sources[out] = source
            return
        for index, part in enumerate(out):
            self.sources[part] = _sources.pick(source, index)
