"""The same for torch.compile, which cannot look into `torch.func.debug_unwrap` (torch 2.13)."""

import torch
from torch import Tensor

from torchjd_func.differentiate._detach import detach_plain


@torch.compiler.allow_in_graph
def detach(x: Tensor) -> Tensor:
    """Detach a tensor that requires a gradient of plain autograd alone."""
    return detach_plain(x)
