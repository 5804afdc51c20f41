"""What a step leaves as it was, and should train: tensors closed over, and buffers dropped."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._functionalize import watched_buffers
from torchjd_func._host import whole_batch
from torchjd_func.differentiate._detach import detach_plain
from torchjd_func.differentiate._pullback import origins

PyTree = Any


def kept_buffers(has_aux: bool) -> AbstractContextManager[None]:
    """Return what warns of buffers that modules overwrite in an objective that returns none.

    Not in a graph.
    """
    return nullcontext() if has_aux or torch.compiler.is_compiling() else _kept_buffers()


@contextmanager
def _kept_buffers() -> Generator[None, None, None]:
    """Look at what was overwritten in between."""
    with watched_buffers() as names:
        yield
    _check.kept_buffers(sorted(names))


def check_passed(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: Any, argnums: int | tuple[int, ...]
) -> None:
    """Warn of arguments that were computed from what plain autograd would train; not in a graph.

    `values` are both without their past, the same objects if they have none.
    """
    if torch.compiler.is_compiling() or (values[0] is args and values[1] is kwargs):
        return
    places = _check.argnums(argnums, len(args))
    rest = {str(i): arg for i, arg in enumerate(args) if i not in places} | kwargs
    pairs = zip(_tree.paths(rest), _tree.leaves(rest), strict=True)
    _check.passed([path for path, x in pairs if isinstance(x, Tensor) and _is_computed(x)])


def check_state(state: PyTree, values: PyTree) -> None:
    """Warn of a state that requires a gradient, given that without; not in a graph."""
    if not torch.compiler.is_compiling() and values is not state:
        pairs = zip(_tree.names(state), _tree.leaves(state), strict=True)
        leaves = [(path, x) for path, x in pairs if isinstance(x, Tensor)]
        tracked = [(path, x) for path, x in leaves if detach_plain(x) is not x]
        _check.trained_state([path for path, x in tracked if not _is_computed(x)])


def check_options(result: PyTree, values: PyTree, losses: PyTree) -> None:
    """Warn of what a result depends on by plain autograd, other than losses do; not in a graph.

    That is what a rule was made with: arguments and states are without their past.
    """
    if torch.compiler.is_compiling() or values is result:
        return
    grads, _, state = result
    of_losses = {id(x) for x in _origins(_tree.tensors(losses))}
    found = _origins(_tree.tensors((grads, state)))
    _check.trained_options([x.shape for x in found if id(x) not in of_losses])


def _is_computed(x: Tensor) -> bool:
    """Say whether plain autograd computed a tensor from others."""
    return detach_plain(x) is not x and whole_batch(x).grad_fn is not None


def check_inside(losses: PyTree) -> None:
    """Warn of tensors that require a gradient and get none; arguments are detached, so not those.

    Not in a graph, which has no plain autograd to look at.
    """
    if not torch.compiler.is_compiling():
        _check.inside(outside(_tree.tensors(losses)))


def outside(losses: Sequence[Tensor]) -> list[torch.Size]:
    """Return the shapes of what losses depend on by plain autograd, at no cost if by nothing."""
    return [x.shape for x in _origins(losses)]


def _origins(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of plain autograd that tensors depend on."""
    tracked = [whole_batch(x) for x in tensors if detach_plain(x) is not x]
    return list(origins(tracked).values())
