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
from torchjd_func._shares import Numbers, Rows
from torchjd_func._types import PyTree
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._checksums import checksums, is_inexact
from torchjd_func.distributed._collectives import Group

Agreed: TypeAlias = Callable[[Any], Any]  # returns what it is given, once all processes agree
# What is known when a graph runs, by what is in its place.
KINDS = {"\x02Tensor": lambda x: x, "\x02Rows": Rows, "\x02Numbers": Numbers}
PARTS, APART = 2**20, 2**12  # of a checksum: in one, and by how many those of processes may differ


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
        _compare(_briefs(_by_path(tree)), (group,))


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
        tensors, text = _for_graphs(tree)
        if not tensors:  # nor is there anything to exchange
            return _unchanged
        return partial(_after, _checked(tensors, text, _names(groups)))
    _check_leaves(_by_path(tree), groups)
    return _unchanged


def _unchanged(numbers: PyTree) -> PyTree:
    """Return what is given."""
    return numbers


def _after(zero: Tensor, numbers: PyTree) -> PyTree:
    """Return numbers that are there once a zero is."""
    return _tree.map(lambda leaf: leaf + zero.to(leaf.dtype), numbers)


def _check_leaves(leaves: dict[str, Any], groups: Sequence[Group]) -> None:
    """Compare what has to be the same by two numbers; in full where these differ."""
    briefs = _briefs(leaves)
    number, level = digest(briefs), _level(leaves)
    high, low, most, least = _collectives.largest([number, -number, level, -level], groups)
    if high != -low:
        _compare(briefs, groups)
    if most + least > APART:
        _compare(_levels(leaves, briefs), groups)


def _level(leaves: dict[str, Any]) -> int:
    """Return a number of all that floats hold, which rounding changes by little."""
    return round(PARTS * sum(checksums(leaves).values()))


def _levels(leaves: dict[str, Any], briefs: dict[str, str]) -> dict[str, str]:
    """Return what has to be the same of each leaf, with its checksum if it holds floats."""
    sums = checksums(leaves)
    return {
        path: f"{brief} with checksum {sums[path]}" if path in sums else brief
        for path, brief in briefs.items()
    }


@torch.library.custom_op("torchjd_func::check_step", mutates_args=())
def _checked(tensors: Sequence[Tensor], text: str, groups: str) -> Tensor:
    """Check a step when a graph runs; return 0."""
    rest, leaves = iter(tensors), {}
    for line in text.split("\n"):
        path, _, brief = line.partition("\x01")
        leaves[path] = KINDS[brief](next(rest)) if brief in KINDS else brief
    _check_leaves(leaves, [_collectives.group_of(name) for name in groups.split("\n")])
    return tensors[0].new_zeros((), dtype=torch.float32)


@_checked.register_fake
def _(tensors: Sequence[Tensor], text: str, groups: str) -> Tensor:
    return tensors[0].new_zeros((), dtype=torch.float32)


def _for_graphs(tree: PyTree) -> tuple[list[Tensor], str]:
    """Return the tensors of a pytree, and a text with the rest and their kinds."""
    tensors, lines = [], []
    for path, leaf in zip(_tree.paths(tree), _tree.leaves(tree), strict=True):
        text = leaf
        if isinstance(leaf, Tensor | Rows | Numbers):
            known = isinstance(leaf, Tensor)
            tensors.append((leaf if known else leaf.of).detach())
            text = "\x02" + ("Tensor" if known else type(leaf).__name__)
        lines.append(f"{path}\x01{text}")
    return tensors, "\n".join(lines)


def _names(groups: Sequence[Group]) -> str:
    """Return the names of groups."""
    return "\n".join([_collectives.named(group) for group in groups])


def numbers_of_all(numbers: list[int], tree: PyTree, groups: Sequence[Group]) -> list[list[int]]:
    """Return some numbers of each process of a mesh, once a pytree is the same on all."""
    leaves = _by_path(tree)
    briefs = _briefs(leaves)
    row = [digest(briefs), _level(leaves), *numbers]
    own = torch.tensor([row], device=_collectives.device(groups[0]))
    for group in reversed(groups):
        own = _collectives.all_gather(own, group)
    digests, levels, *columns = zip(*own.tolist(), strict=True)
    if len(set(digests)) > 1:
        _compare(briefs, groups)
    if max(levels) - min(levels) > APART:
        _compare(_levels(leaves, briefs), groups)
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


def _briefs(leaves: dict[str, Any]) -> dict[str, str]:
    """Return what has to be the same of each leaf."""
    return {path: _brief(leaf) for path, leaf in leaves.items()}


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Return each leaf by its name."""
    return dict(zip(_tree.paths(tree), _tree.leaves(tree), strict=True))


def _brief(leaf: Any) -> str:
    """Return what has to be the same of a leaf, but for floats."""
    if not isinstance(leaf, Numbers):
        return _check.describe(leaf) if isinstance(leaf, Tensor) else str(leaf)
    brief = _check.describe(leaf.of)
    if leaf.of.is_meta or is_inexact(leaf.of):
        return brief
    numbers = str(leaf.of.tolist())
    return f"{brief} that holds {numbers if len(numbers) < 100 else digest({'': numbers})}"
