"""Objectives whose backward pass runs at another scale, for float16 not to underflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchjd_func.differentiate._linearized import Linearized
from torchjd_func.differentiate._objective import Function, Objective, as_objective, shown
from torchjd_func.differentiate._request import Request


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Scaled:
    """An objective with the losses and gradients of `fn`, pulled back at another scale."""

    fn: Objective
    scale: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def linearize(self, request: Request) -> Linearized:
        """Let the objective linearize itself, at this scale."""
        scale = self.scale if request.scale is None else self.scale * request.scale
        return self.fn.linearize(request._replace(scale=scale))

    def wrap(self, change: Callable[[Function], Function]) -> Scaled:
        """Return the scaled objective of the changed function."""
        return Scaled(as_objective(self.fn.wrap(change)), self.scale)

    def rows_like(self, primals: Any, m: int) -> Any:
        return self.fn.rows_like(primals, m)

    def plan(self, request: Request) -> None:
        self.fn.plan(request)

    @property
    def spans_processes(self) -> bool:
        return self.fn.spans_processes

    def __repr__(self) -> str:
        return f"Scaled({shown(self.fn)})"
