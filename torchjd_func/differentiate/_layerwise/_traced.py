"""What a graph has done once, while it is traced; importing this loads the compiler."""

import warnings
from typing import Any

import torch

from torchjd_func import _check
from torchjd_func.differentiate._layerwise._plan import Listed


@torch.compiler.assume_constant_result
def entries_of(listed: Listed) -> tuple[Any, ...]:
    """Return operations as constants of the graph; torch guards which object holds them."""
    return listed.entries


@torch.compiler.assume_constant_result
def warn_unplanned(reason: str) -> bool:
    """Warn while a graph is traced, which runs this once."""
    warnings.warn(_check.unplanned_graph(reason), UserWarning, stacklevel=2)
    return True
