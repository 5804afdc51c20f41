"""Values in, values out: plain autograd is stripped, what torch.func tracks is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import debug_unwrap

from torchjd_func import _tree
from torchjd_func._host import whole_batch

PyTree = Any


def detached(tree: PyTree) -> PyTree:
    """Return a pytree whose tensors keep no graph of plain autograd; as it is, if none does."""
    if torch.compiler.is_compiling():
        from torchjd_func.differentiate._compiled import detach
    else:
        detach = detach_plain
    flat, rebuild = _tree.flatten(tree)
    known = {leaf: detach(leaf) for leaf in flat if isinstance(leaf, Tensor)}
    if all(leaf is value for leaf, value in known.items()):
        return tree
    return rebuild([known.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat])


def detach_plain(x: Tensor) -> Tensor:
    """Detach a tensor, or one of the batch in `vmap`, that requires plain gradients alone."""
    # What grad, vjp and jvp wrap is left alone, since detaching would cut what is tracked.
    batch = whole_batch(x)
    plain = batch.requires_grad and debug_unwrap(batch, recurse=False) is batch
    return x.detach() if plain else x
