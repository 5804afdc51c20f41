"""What graphs cannot look into, or do once while they are traced; it loads the compiler.

So it is imported where something is compiled, and nowhere else (torch 2.13).
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.differentiate._detach import detach_plain
from torchjd_func.differentiate._layerwise import Listed


@torch.compiler.allow_in_graph
def detach(x: Tensor) -> Tensor:
    """Detach a tensor that requires a gradient of plain autograd alone."""
    return detach_plain(x)


@torch.compiler.assume_constant_result
def entries_of(listed: Listed) -> tuple[Any, ...]:
    """Return operations as constants of the graph; torch guards which object holds them."""
    return listed.entries


@torch.compiler.assume_constant_result
def warn_unplanned(reason: str) -> bool:
    """Warn while a graph is traced, which runs this once."""
    warnings.warn(_check.unplanned_graph(reason), UserWarning, stacklevel=2)
    return True
