"""Bytes that a process hands to the collectives of `jd.distributed`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

from torch import Tensor

from torchjd_func.distributed import _collectives


@contextlib.contextmanager
def traffic() -> Generator[list[tuple[str, int]]]:
    """List the collectives of an eager block: the name, and the bytes of the longer side."""
    found: list[tuple[str, int]] = []
    run = _collectives._run

    def counting(name: str, fn: Any, group: Any, *values: Any) -> Any:
        """Note what is transferred, and transfer it."""
        sizes = [value.nbytes for value in values if isinstance(value, Tensor)]
        found.extend((name, max(sizes)) for _ in sizes[:1])
        return run(name, fn, group, *values)

    with mock.patch.object(_collectives, "_run", counting):
        yield found
