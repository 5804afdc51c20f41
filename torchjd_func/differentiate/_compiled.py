"""What graphs cannot look into, or do once while they are traced; it loads the compiler.

So it is imported where something is compiled, and nowhere else (torch 2.13).
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.differentiate._detach import detach_plain
from torchjd_func.differentiate._layerwise import Layout, Plan, Settled, Step


@torch.compiler.allow_in_graph
def detach(x: Tensor) -> Tensor:
    """Detach a tensor that requires a gradient of plain autograd alone."""
    return detach_plain(x)


def plan_of(settled: Settled) -> Plan:
    """Return the plan that graphs replay."""
    layout, steps, opaque, entries = _parts(settled)
    made = [Step(*[_plain(x) for x in step]) for step in steps]
    return Plan(Layout(*layout), tuple(made), (*opaque,), {}, (), entries=entries)


def _plain(x: Any) -> Any:
    """Return a value that compares: constants of a graph do not (torch 2.12)."""
    return (*x,) if isinstance(x, tuple) else x


@torch.compiler.assume_constant_result
def _parts(settled: Settled) -> Any:
    """Return the parts of a plan as constants; torch guards which object holds them."""
    # Numbers that differ from graph to graph would be taken as such that vary (torch 2.13)
    return settled.parts


@torch.compiler.assume_constant_result
def warn_unplanned(reason: str) -> bool:
    """Warn while a graph is traced, which runs this once."""
    warnings.warn(_check.unplanned_graph(reason), UserWarning, stacklevel=2)
    return True
