"""A warning of a graph, given once, while it is traced."""

import warnings

import torch

from torchjd_func import _check


@torch.compiler.assume_constant_result
def warn_unplanned(reason: str) -> bool:
    """Warn while a graph is traced, which runs this once."""
    warnings.warn(_check.unplanned_graph(reason), UserWarning, stacklevel=2)
    return True
