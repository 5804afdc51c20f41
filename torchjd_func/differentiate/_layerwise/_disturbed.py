"""Noise for the run of a proof: where a coefficient is zero, nothing tells what it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchjd_func.differentiate._layerwise._functions import named
from torchjd_func.differentiate._layerwise._noise import near
from torchjd_func.differentiate._layerwise._operations import Operations
from torchjd_func.differentiate._layerwise._plan import Layout, Plan
from torchjd_func.differentiate._layerwise._sources import instances_in
from torchjd_func.differentiate._layerwise._trace import Trace


class Disturbed(Trace):
    """Watches a run as planned, and adds a little noise.

    Args:
        handles: The parameters, as they are handed to the objective.
        layout: How the objective treats examples.
        operations: Numbers tensors.
        plan: What operations become.
        noisy: 1 if the outputs of uses get noise, 2 if numbers that the code names do as well.
    """

    def __init__(
        self,
        handles: Sequence[Tensor],
        layout: Layout,
        operations: Operations,
        plan: Plan,
        noisy: int,
    ) -> None:
        super().__init__(handles, layout, operations, plan)
        self.noisy = noisy

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation, with other numbers in the place of those that the code names."""
        # A schedule may change them, and they may be zero at first: plans do not say what they are.
        if self.noisy < 2:
            return super().apply(func, *args, **kwargs)
        given = self.operations.begin(func, args, kwargs)
        if func in _ARITHMETIC and any(x.is_floating_point() for x in given):
            args = tuple(map(self.elsewhere, args))
            kwargs = {name: self.elsewhere(x) for name, x in kwargs.items()}
        if self.on_sources(given):
            out = self.on_parameters(func, args, kwargs, given)
        else:
            out = self.run(func, *args, **kwargs)
        named = not given and instances_in(float, args)
        if named and isinstance(out, Tensor) and out.is_floating_point():
            out = _elsewhere(out)
        self.operations.end(out, given)
        return out

    def elsewhere(self, x: Any) -> Any:
        """Return another number for a number, or for a tensor of one that came from without."""
        if not isinstance(x, Tensor):
            return _elsewhere(x) if type(x) in (int, float) else x
        if x.numel() != 1 or x.requires_grad or not x.is_floating_point():
            return x
        number = self.operations.number(x)
        return _elsewhere(x) if number is None or number < self.operations.inputs else x

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Run an operation with parameters as planned, and add noise to what a use returns."""
        count = len(self.uses)
        out = super().on_parameters(func, args, kwargs, given)
        return near(out) if len(self.uses) > count else out


def _elsewhere(x: Any) -> Any:
    """Return other numbers."""
    return 1.1 * x + 0.1


_ARITHMETIC = named(
    "add sub subtract mul multiply div divide true_divide rsub lerp __radd__ __rsub__ __rmul__"
)
