"""A check, before numbers are exchanged, that all ranks are about to do the same."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._types import PyTree
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._collectives import Group


def check_same(tree: PyTree, group: Group = None) -> None:
    """Check that a pytree has the same names, shapes and dtypes on all ranks.

    Collectives do not check this: ranks that disagree hang, or mix up their numbers. The `init` of
    a rule of `jd.distributed`, and so `jd.init_state`, calls it on the Jacobian, the name of the
    rule and the key. It exchanges names, not numbers, and waits for all ranks: call it where
    shapes may have changed, not at each step. In a compiled function it does nothing: take the
    state from an eager `init`.

    Args:
        tree: Pytree of tensors, of which shapes and dtypes count, and of anything else, which has
            to be equal.
        group: The ranks; by default all.

    Raises:
        ValueError: On all ranks, if one differs from the first rank; with its number.
        RuntimeError: If another rank has ended, naming this rank and the collective.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> jd.distributed.check_same({"weight": torch.zeros(2, 3), "batch": 32})
        >>> dist.destroy_process_group()
    """
    if torch.compiler.is_compiling():
        return
    named = zip(_tree.paths(tree), _tree.leaves(tree), strict=True)
    text = json.dumps({path: _brief(x) for path, x in named})
    first, *others = map(json.loads, _collectives.gather_texts(text, group))
    for number, other in enumerate(others, start=1):
        for path in [*first, *(path for path in other if path not in first)]:
            pair = first.get(path, "nothing"), other.get(path, "nothing")
            _check.same_on_ranks(path, number, *pair)


def check_start(name: str, tree: PyTree, key: Tensor | None, group: Group) -> None:
    """Check that all ranks start the same rule, on the same shapes, with the same key."""
    if not torch.compiler.is_compiling():
        check_same({"rule": name, "key": None if key is None else str(key.tolist()), **tree}, group)


def _brief(leaf: Any) -> str:
    """Return what has to be the same of a leaf."""
    return _check.describe(leaf) if isinstance(leaf, Tensor) else repr(leaf)
