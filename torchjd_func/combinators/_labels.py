"""From the names of parameters to the groups that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torchjd_func import _check, _tree

Labels = Callable[[str], Hashable] | Mapping[str, Hashable]


def together(path: str) -> str:
    """Label all parameters the same: one group.

    Args:
        path: The name of a parameter, such as `"encoder.0.weight"`.

    Returns:
        `"all"`.

    Example:
        >>> import torchjd_func as jd
        >>> jd.together("encoder.0.weight")
        'all'
    """
    return "all"


def by_network(path: str) -> str:
    """Label a parameter by the first part of its name: a group for each network.

    Args:
        path: The name of a parameter, such as `"encoder.0.weight"`.

    Returns:
        What comes before the first dot.

    Example:
        >>> import torchjd_func as jd
        >>> jd.by_network("encoder.0.weight")
        'encoder'
    """
    return path.partition(".")[0]


def by_layer(path: str) -> str:
    """Label a parameter by all but the last part of its name: a group for each layer.

    Args:
        path: The name of a parameter, such as `"encoder.0.weight"`.

    Returns:
        What comes before the last dot; `""` if there is none.

    Example:
        >>> import torchjd_func as jd
        >>> jd.by_layer("encoder.0.weight")
        'encoder.0'
    """
    return path.rpartition(".")[0]


def by_tensor(path: str) -> str:
    """Label a parameter by its whole name: a group for each tensor.

    Args:
        path: The name of a parameter, such as `"encoder.0.weight"`.

    Returns:
        The name.

    Example:
        >>> import torchjd_func as jd
        >>> jd.by_tensor("encoder.0.weight")
        'encoder.0.weight'
    """
    return path


def by_path(labels: Any) -> Labels:
    """Return a function of a name, or a pytree of labels as a table of them by name."""
    if callable(labels):
        return labels
    return dict(zip(_tree.paths(labels), _tree.leaves(labels), strict=True))


def label_all(labels: Labels, paths: Sequence[str]) -> list[Hashable]:
    """Return the labels of the names of all parameters."""
    return _by_prefix(labels, paths) if isinstance(labels, Mapping) else _by_function(labels, paths)


def _by_function(fn: Callable[[str], Hashable], paths: Sequence[str]) -> list[Hashable]:
    """Label names by a function."""
    return [_check.label(path, fn(path)) for path in paths]


def _by_prefix(table: Mapping[str, Hashable], paths: Sequence[str]) -> list[Hashable]:
    """Label names by their longest start that is in the table."""
    starts = [_longest(table, path) for path in paths]
    missing = [path for path, start in zip(paths, starts, strict=True) if start is None]
    _check.labelled(missing, [name for name in table if name not in starts])
    return [_check.label(start, table[start]) for start in starts if start is not None]


def _longest(table: Mapping[str, Hashable], path: str) -> str | None:
    """Return the longest start of a name, in whole parts, that is in the table."""
    parts = path.split(".")
    starts = [".".join(parts[:size]) for size in range(len(parts), -1, -1)]
    return next((start for start in starts if start in table), None)
