"""A module, or a tree of modules, as a pure function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchjd_func import _check, _tree
from torchjd_func._host import version_of

PyTree = Any
Tensors = dict[str, Tensor]


class Lent(WeakValueDictionary[str, Tensor]):
    """The parameters that share memory with a module, while somebody holds them."""

    def __deepcopy__(self, memo: Any) -> Lent:
        """Return none: those of a copied module are its own."""
        return Lent()

    def __reduce__(self) -> Any:
        """Keep none, for the same reason."""
        return Lent, ()


_written: ContextVar[set[str] | None] = ContextVar("_written", default=None)


@contextmanager
def watched_buffers() -> Generator[set[str], None, None]:
    """Gather the names of buffers that modules overwrite in training; not those of graphs."""
    names: set[str] = set()
    token = _written.set(names)
    try:
        yield names
    finally:
        _written.reset(token)


def _note_written(copies: list[str], before: Tensors, after: Tensors) -> None:
    """Note which copies of buffers a module wrote into, or replaced, where somebody asks."""
    names = _written.get()
    if names is not None:
        seen = [x for x in copies if after[x] is not before[x] or version_of(after[x])]
        # With those by their side: torch counts no version of what batch_norm writes (2.13).
        places = {x.rpartition(".")[0] for x in seen}
        names.update(x for x in copies if x.rpartition(".")[0] in places)


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Apply:
    """A module as a function; torch.compile looks at the fields one by one, the names first."""

    recurrent: list[tuple[str, str]]
    trained: list[str]  # the names of the parameters
    frozen: list[str]  # the names of parameters that are constants
    overwritten: list[str]  # the names of the buffers
    model: nn.Module
    lent: Lent

    def __call__(
        self, params: Tensors, buffers: Tensors, /, *inputs: Any, **kwargs: Any
    ) -> tuple[Any, Tensors]:
        """Run the module on copies of the buffers, which it may overwrite."""
        _check.capturable(self.recurrent)
        if not torch.compiler.is_compiling():
            _check.lent(self.model, self.lent, self.frozen)
        _check.names("params", params, self.trained)
        _check.names("buffers", buffers, [*self.frozen, *self.overwritten])
        fresh = {name: buffers[name].clone() for name in self.overwritten}
        fresh = {name: fresh.get(name, buffer) for name, buffer in buffers.items()}
        tensors = {**params, **fresh}  # one dict: functional_call writes new buffers into it
        if self.recurrent:  # whose weights torch moves to other memory on a GPU (2.13)
            tensors |= {name: x.view_as(x) for name, x in params.items() if x.is_cuda}
        outputs = functional_call(self.model, tensors, inputs, kwargs, strict=True)
        after = {name: tensors[name] for name in fresh}
        if self.model.training and not torch.compiler.is_compiling():
            _note_written(self.overwritten, fresh, after)
        return outputs, after

    def __repr__(self) -> str:
        """Return the kind of the module in one line."""
        return f"Apply({type(self.model).__name__})"


def functionalize(model: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """Turn a module into a pure function, its parameters and its buffers.

    Args:
        model: Any module. Whether it trains or evaluates is read at each call of `apply`. Or a tree
            of modules, such as `(trunk, {"a": head})` for `jd.multitask`; an `nn.ModuleDict` or an
            `nn.ModuleList` counts as a dict, or as a list.

    Returns:
        `(apply, params, buffers)`. `apply(params, buffers, *inputs, **kwargs)` returns
        `(outputs, buffers)` and changes nothing: running statistics come back as new buffers. While
        it runs the module holds what it is given: no other thread may use the module then.
        `params` holds the parameters that require a gradient now; those that do not (LoRA's base
        weights) are constants, and with the buffers. Both are dicts of detached tensors that share
        memory with the module, so call this after `model.to(...)`, and again after what replaces
        or unfreezes its parameters (`apply` warns); a tied weight is listed once, under its first
        name. For a tree of modules, three trees.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the model or a part of it is compiled, wrapped for several processes, lazy,
            has backward hooks, or is an embedding with `sparse` or `max_norm`; if its parameters
            are sharded or have hooks; if a parameter, or a view of it, is also kept in a list or a
            closure, or shared by two modules of the tree. From `apply`, if a name is unknown or
            missing, or torch.compile meets an `nn.RNN`, `nn.LSTM` or `nn.GRU`.

    Example:
        >>> import torch, torchjd_func as jd
        >>> apply, params, buffers = jd.functionalize(torch.nn.Linear(2, 1))
        >>> outputs, buffers = apply(params, buffers, torch.ones(3, 2))
        >>> sorted(params), tuple(outputs.shape)
        (['bias', 'weight'], (3, 1))
    """
    model = opened(model)
    models, rebuild = _tree.flatten(model)
    _check.modules(models)
    owners = [dict(part.named_parameters()) for part in models]
    _check.owned_once(_tree.paths(model), owners)
    applies, params, buffers = zip(*map(_functionalize, models), strict=True)
    return rebuild(applies), rebuild(params), rebuild(buffers)


def opened(tree: PyTree) -> PyTree:
    """Return dicts and lists in the place of modules that hold others, and cannot be called."""
    if isinstance(tree, Mapping | nn.ModuleDict):
        return {name: opened(part) for name, part in tree.items()}
    if isinstance(tree, list | nn.ModuleList):
        return [opened(part) for part in tree]
    return tuple(opened(part) for part in tree) if type(tree) is tuple else tree


def _functionalize(model: nn.Module) -> tuple[Callable[..., Any], Tensors, Tensors]:
    """Turn one module into a pure function."""
    named_modules = list(model.named_modules())
    parameters = dict(model.named_parameters())
    _check.supported(named_modules)
    _check.whole_parameters(parameters)
    _check.without_hooks(parameters)
    _check.kept_once(named_modules, parameters)
    params = {name: x.detach() for name, x in parameters.items() if x.requires_grad}
    frozen = {name: x.detach() for name, x in parameters.items() if not x.requires_grad}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    recurrent = _check.recurrent(named_modules)
    apply = Apply(recurrent, list(params), list(frozen), list(buffers), model, Lent(params))
    return apply, params, {**frozen, **buffers}
