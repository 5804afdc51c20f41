"""Run a function for what it returns, and leave modules and random generators as they were."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchjd_func.differentiate._layerwise._draws import Draws

Undo = Callable[[], None]


@contextmanager
def untouched(*roots: Any) -> Generator[None]:
    """Put modules and generators back that the roots reach: caches, buffers, random states."""
    undo = [undo for thing in _reachable(roots) for undo in _snapshots(thing)]
    undo.append(Draws([], {}).with_host().restore)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for step in undo:
            step()


def _reachable(roots: Iterable[Any]) -> list[Any]:
    """Return the modules and generators that functions and containers lead to."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = list(roots)
    kinds = (nn.Module, torch.Generator, random.Random, np.random.Generator)
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, kinds):
            found[id(value)] = value
        left.extend(_parts(value))
    return list(found.values())


def _parts(value: Any) -> Iterable[Any]:
    """Return what a value holds."""
    if isinstance(value, Tensor | str | type | types.ModuleType):
        return ()
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.FunctionType):
        return _held_by_function(value)
    if is_dataclass(value):
        return [getattr(value, field.name, None) for field in fields(value)]
    if callable(value):
        return getattr(value, "__dict__", {}).values()
    return ()


def _held_by_function(fn: types.FunctionType) -> list[Any]:
    """Return what a function closes over, its defaults, and the globals that its code names."""
    cells = [_content(cell) for cell in fn.__closure__ or ()]
    defaults = (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
    named = [fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__]
    return [*cells, *defaults, *named]


def _names(code: types.CodeType) -> list[str]:
    """Return the names in the code of a function, and of functions in it."""
    inner = [name for x in code.co_consts if isinstance(x, types.CodeType) for name in _names(x)]
    return [*code.co_names, *inner]


def _content(cell: types.CellType) -> Any:
    """Return what a cell holds, which may be nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _snapshots(thing: Any) -> list[Undo]:
    """Return what puts a module, or a generator, back."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return [lambda: thing.set_state(state) and None]
    if isinstance(thing, random.Random):
        return [functools.partial(thing.setstate, thing.getstate())]
    if isinstance(thing, np.random.Generator):
        source, drawn = thing.bit_generator, thing.bit_generator.state
        return [functools.partial(setattr, source, "state", drawn)]
    attributes = thing.__dict__
    held = [*attributes.values(), *attributes.get("_buffers", {}).values()]
    undo = [_refill(attributes)]
    undo += [_refill(value) for value in attributes.values() if isinstance(value, dict | list)]
    return undo + [_rewrite(value) for value in held if isinstance(value, Tensor)]


def _refill(container: Any) -> Undo:
    """Return what puts the entries of a dict or of a list back."""
    entries = container.copy()

    def undo() -> None:
        container.clear()
        (container.update if isinstance(container, dict) else container.extend)(entries)

    return undo


def _rewrite(x: Tensor) -> Undo:
    """Return what puts the values of a tensor back, if these were overwritten."""
    version, values = x._version, x.detach().clone()

    def undo() -> None:
        if x._version != version:
            with torch.no_grad():
                x.copy_(values)

    return undo
