"""Checks, before numbers are exchanged, that all processes are about to do the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._types import PyTree
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._collectives import Group


def check_same(tree: PyTree, group: Group = None) -> None:
    """Check that a pytree has the same names, shapes and dtypes on all processes.

    Collectives do not check this: processes that disagree hang, or mix up their numbers. The `init`
    of a rule of `jd.distributed`, and so `jd.init_state`, calls it on the Jacobian, the name of the
    rule and the key; steps compare a digest of the like by one small all-reduce. It exchanges
    names, not numbers, and waits for all processes. In a compiled function it does nothing: take
    the state from an eager `init`.

    Args:
        tree: Pytree of tensors, of which shapes and dtypes count, and of anything else, which has
            to be equal.
        group: The processes; by default all.

    Raises:
        ValueError: On all processes, if one differs from the first; with its number.
        RuntimeError: If another process has ended, naming this process and the collective.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> jd.distributed.check_same({"weight": torch.zeros(2, 3), "batch": 32})
        >>> dist.destroy_process_group()
    """
    if not torch.compiler.is_compiling():
        _compare(_briefs(tree), (group,))


def check_start(name: str, tree: PyTree, key: Tensor | None, group: Group) -> None:
    """Check that all processes start the same rule, on the same shapes, with the same key."""
    if not torch.compiler.is_compiling():
        check_same({"rule": name, "key": None if key is None else str(key.tolist()), **tree}, group)


def check_step(tree: PyTree, groups: Sequence[Group]) -> None:
    """Check by one all-reduce of two numbers that a pytree is the same on all processes of a mesh.

    The groups are those of the dimensions of the mesh. In a compiled function it does nothing.
    """
    if torch.compiler.is_compiling():
        return
    briefs = _briefs(tree)
    number = digest(briefs)
    high, low = _collectives.largest([number, -number], groups)
    if high != -low:
        _compare(briefs, groups)


def numbers_of_all(numbers: list[int], tree: PyTree, groups: Sequence[Group]) -> list[list[int]]:
    """Return some numbers of each process of a mesh, once a pytree is the same on all."""
    briefs = _briefs(tree)
    own = torch.tensor([[digest(briefs), *numbers]], device=_collectives.device(groups[0]))
    for group in reversed(groups):
        own = _collectives.all_gather(own, group)
    digests, *columns = zip(*own.tolist(), strict=True)
    if len(set(digests)) > 1:
        _compare(briefs, groups)
    return [list(row) for row in zip(*columns, strict=True)]


def digest(briefs: dict[str, str]) -> int:
    """Return a number that is the same in all processes, and another for other names or values."""
    return int.from_bytes(hashlib.blake2b(repr(briefs).encode(), digest_size=7).digest())


def _compare(briefs: dict[str, str], groups: Sequence[Group]) -> None:
    """Say which process is the first to differ, and in what."""
    every = [briefs]
    for group in reversed(groups):  # last dimension first: the processes in the order of the mesh
        parts = _collectives.gather_texts(json.dumps(every), group)
        every = [part for text in parts for part in json.loads(text)]
    first, *others = every
    for number, other in enumerate(others, start=1):
        paths = [*first, *(path for path in other if path not in first)]
        for path in sorted(paths, key=_is_of_the_batch):  # last: there is none with a size
            pair = first.get(path, "nothing"), other.get(path, "nothing")
            _check.same_everywhere(path, number, *pair)


def _is_of_the_batch(path: str) -> bool:
    """Say whether a path is that of the length of a tensor."""
    return path.startswith("batch.")


def _briefs(tree: PyTree) -> dict[str, str]:
    """Return what has to be the same of each leaf."""
    pairs = zip(_tree.paths(tree), _tree.leaves(tree), strict=True)
    return {path: _brief(x) for path, x in pairs}


def _brief(leaf: Any) -> str:
    """Return what has to be the same of a leaf."""
    return _check.describe(leaf) if isinstance(leaf, Tensor) else str(leaf)
