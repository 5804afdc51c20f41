"""Checks, before numbers are exchanged, that all processes are about to do the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._shares import Rows
from torchjd_func._types import PyTree
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._collectives import Group

Agreed: TypeAlias = Callable[[Any], Any]  # returns what it is given, once all processes agree
TENSOR, LENGTH = "\x02tensor", "\x02length"  # in the place of what is known when a graph runs


def check_same(tree: PyTree, group: Group = None) -> None:
    """Check that a pytree has the same names, shapes and dtypes on all processes.

    Collectives do not check this: processes that disagree hang, or mix up their numbers. The `init`
    of a rule of `jd.distributed`, and so `jd.init_state`, calls it on the Jacobian, the name of the
    rule and the key; steps, compiled ones too, compare a digest of the like by one small
    all-reduce. It exchanges names, not numbers, and waits for all processes. In a compiled function
    it does nothing: take the state from an eager `init`.

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
    _collectives.valid(group)
    if not torch.compiler.is_compiling():
        _compare(_briefs(tree), (group,))


def check_start(name: str, tree: PyTree, key: Tensor | None, group: Group) -> None:
    """Check that all processes start the same rule, on the same shapes, with the same key."""
    if not torch.compiler.is_compiling():
        numbers = key if key is None or key.is_meta else str(key.tolist())
        check_same({"rule": name, "key": numbers, **tree}, group)


def agreed(tree: PyTree, groups: Sequence[Group], check: bool = True) -> Agreed:
    """Check by one all-reduce of two numbers that a pytree is the same on all processes of a mesh.

    Args:
        tree: As for `check_same`.
        groups: Those of the dimensions of the mesh.
        check: Whether to.

    Returns:
        A function that what is exchanged afterwards goes through, unchanged: a graph knows no order
        but that of its data, and drops what nothing depends on.
    """
    if not check:
        return _unchanged
    if torch.compiler.is_compiling():
        tensors, lengths, text = _for_graphs(tree)
        if not tensors and not lengths:  # nor is there anything to exchange
            return _unchanged
        return partial(_after, _checked(tensors, lengths, text, _names(groups)))
    _check_digest(_briefs(tree), groups)
    return _unchanged


def _unchanged(numbers: PyTree) -> PyTree:
    """Return what is given."""
    return numbers


def _after(zero: Tensor, numbers: PyTree) -> PyTree:
    """Return numbers that are there once a zero is."""
    return _tree.map(lambda leaf: leaf + zero.to(leaf.dtype), numbers)


def _check_digest(briefs: dict[str, str], groups: Sequence[Group]) -> None:
    """Compare what has to be the same by a number; in full where that differs."""
    number = digest(briefs)
    high, low = _collectives.largest([number, -number], groups)
    if high != -low:
        _compare(briefs, groups)


@torch.library.custom_op("torchjd_func::check_step", mutates_args=())
def _checked(
    tensors: Sequence[Tensor], lengths: Sequence[Tensor], text: str, groups: str
) -> Tensor:
    """Check a step when a graph runs; return 0."""
    parts = iter(tensors), iter(lengths)
    briefs = {}
    for line in text.split("\n"):
        path, _, brief = line.partition("\x01")
        if brief == TENSOR:
            brief = _brief(next(parts[0]))
        elif brief == LENGTH:
            brief = str(Rows(next(parts[1])))
        briefs[path] = brief
    _check_digest(briefs, [_collectives.group_of(name) for name in groups.split("\n")])
    return [*tensors, *lengths][0].new_zeros((), dtype=torch.float32)


@_checked.register_fake
def _(tensors: Sequence[Tensor], lengths: Sequence[Tensor], text: str, groups: str) -> Tensor:
    return [*tensors, *lengths][0].new_zeros((), dtype=torch.float32)


def _for_graphs(tree: PyTree) -> tuple[list[Tensor], list[Tensor], str]:
    """Return the tensors of a pytree, those whose lengths count, and the rest as a text."""
    tensors, lengths, lines = [], [], []
    for path, leaf in zip(_tree.paths(tree), _tree.leaves(tree), strict=True):
        if isinstance(leaf, Tensor):
            tensors.append(leaf.detach())
        if isinstance(leaf, Rows):
            lengths.append(leaf.of.detach())
        kind = TENSOR if isinstance(leaf, Tensor) else LENGTH if isinstance(leaf, Rows) else leaf
        lines.append(f"{path}\x01{kind}")
    return tensors, lengths, "\n".join(lines)


def _names(groups: Sequence[Group]) -> str:
    """Return the names of groups."""
    return "\n".join([_collectives.named(group) for group in groups])


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


def differing(briefs: dict[str, str], groups: Sequence[Group]) -> set[str]:
    """Return the names of what is not the same on all processes of a mesh; not in a graph."""
    number = digest(briefs)
    high, low = _collectives.largest([number, -number], groups)
    if high == -low:
        return set()
    every = _of_all(briefs, groups)
    if len({tuple(other) for other in every}) > 1:
        _compare(briefs, groups)
    return {name for name in briefs if len({other[name] for other in every}) > 1}


def digest(briefs: dict[str, str]) -> int:
    """Return a number that is the same in all processes, and another for other names or values."""
    return int.from_bytes(hashlib.blake2b(repr(briefs).encode(), digest_size=7).digest())


def _compare(briefs: dict[str, str], groups: Sequence[Group]) -> None:
    """Say which process is the first to differ, and in what."""
    first, *others = _of_all(briefs, groups)
    for number, other in enumerate(others, start=1):
        paths = [*first, *(path for path in other if path not in first)]
        for path in sorted(paths, key=_is_of_the_batch):  # last: there is none with a size
            pair = first.get(path, "nothing"), other.get(path, "nothing")
            _check.same_everywhere(path, number, *pair)
        for pair in zip(first, other, strict=True):  # what travels has no names
            _check.same_everywhere("order", number, *pair)


def _of_all(briefs: dict[str, str], groups: Sequence[Group]) -> list[dict[str, str]]:
    """Return what each process of a mesh says."""
    every = [briefs]
    for group in reversed(groups):  # last dimension first: the processes in the order of the mesh
        parts = _collectives.gather_texts(json.dumps(every), group)
        every = [part for text in parts for part in json.loads(text)]
    return every


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
