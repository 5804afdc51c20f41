"""What a module must not be or hold, for it to become a pure function."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torchjd_func._check._messages import describe, fail, place

WRAPPERS = {"DataParallel", "DistributedDataParallel"}
SHARDING = {"FSDPModule", "FullyShardedDataParallel"}


def modules(values: Sequence[Any]) -> None:
    """Check that there are modules, and nothing else."""
    for value in values or (None,):
        if not isinstance(value, nn.Module):
            remedy = "Pass an nn.Module, or a tree of such, e.g. (trunk, {'a': head})."
            fail(TypeError, "`model`", "be a module", describe(value), remedy)


def owned_once(paths: Sequence[str], owners: Sequence[Mapping[str, nn.Parameter]]) -> None:
    """Check that no two modules of a tree have a parameter in common."""
    found: dict[int, str] = {}
    for path, parameters in zip(paths, owners, strict=True):
        for name, parameter in parameters.items():
            other = found.setdefault(id(parameter), path)
            if other != path:
                rule, got = "share no parameters", f"{name!r} of {path!r} in {other!r} as well"
                remedy = "Make one module of both, with both as its parts."
                fail(ValueError, "the modules of a tree", rule, got, remedy)


def whole_parameters(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that no parameter is sharded."""
    for name, parameter in parameters.items():
        if any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__):
            fail(ValueError, f"`model.{name}`", "be a whole tensor", "a DTensor", SHARDED)


def without_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that no hook changes the gradients of a parameter, or takes a step with them."""
    for name, x in parameters.items():
        if x.requires_grad and (x._backward_hooks or x._post_accumulate_grad_hooks):
            rule = "have no hooks, which torch.func does not run"
            remedy = (
                "Remove them, and change what jd.grad returns, such as grads[name] * mask; or call "
                "jd.interop.backward_(losses, model, rule), which runs those of register_hook."
            )
            fail(ValueError, f"`model.{name}`", rule, "hooks of the parameter", remedy)


def kept_once(
    named_modules: list[tuple[str, nn.Module]], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Check that the model reads its parameters where they are registered, nowhere else."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for where, module in named_modules:
        for attribute, value in vars(module).items():
            if attribute in _REGISTERED or isinstance(module, nn.RNNBase):
                continue
            for x in _tensors(value, depth=4):
                owner = x._base if x.requires_grad and x._base is not None else x
                if id(owner) in names:
                    place = f"{where}.{attribute}" if where else attribute
                    kind = "the same parameter" if owner is x else "a view of it"
                    name, rule = (
                        f"`model.{names[id(owner)]}`",
                        "be kept where it is registered alone",
                    )
                    remedy = "What reads it there would see a constant: use self.<name> instead."
                    fail(ValueError, name, rule, f"{kind} in {place!r}", remedy)


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """Go through the tensors of containers and of closures."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for part in _parts(value):
            yield from _tensors(part, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    """Return what a container, or a closure, holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]


_REGISTERED = {"_parameters", "_buffers", "_modules"}
SHARDED = (
    "Pass dict(model.named_parameters()) as it is to an objective of jd.distributed.sharded, which "
    "calls a copy of the module that fully_shard has not touched."
)


def supported(named_modules: list[tuple[str, nn.Module]]) -> None:
    """Check that each module can run as a pure function."""
    for name, module in named_modules:
        for refuses, rule, remedy in _REFUSED:
            if refuses(module):
                where = f"`model.{name}`" if name else "`model`"
                fail(ValueError, where, rule, type(module).__name__, remedy)


def recurrent(named_modules: list[tuple[str, nn.Module]]) -> list[tuple[str, str]]:
    """Return name and kind of the modules that torch.compile cannot capture (torch 2.13)."""
    return [
        (name, type(module).__name__)
        for name, module in named_modules
        if isinstance(module, nn.RNNBase)
    ]


def lent(model: nn.Module, parameters: Mapping[str, Tensor], frozen: Sequence[str]) -> None:
    """Warn if parameters that are held somewhere are no longer what the module trains."""
    own = dict(model.named_parameters()) if parameters else {}
    for name in frozen:
        if name in own and own[name].requires_grad:
            warnings.warn(
                f"{name!r} of the module requires a gradient now, but did not when "
                "jd.functionalize was called: it stays a constant, which nothing trains. Call "
                "jd.functionalize again after unfreezing.",
                stacklevel=4,
            )
            return
    for name, parameter in parameters.items():
        if not isinstance(own.get(name), nn.Parameter):
            continue
        places = {place(own[name]), place(parameter)} - {None}  # nowhere while a plan is proven
        if len(places) == 2:
            warnings.warn(
                f"{name!r} of the module no longer shares memory with the parameters that "
                "jd.functionalize returned: model.to(...), .double(), load_state_dict(assign=True) "
                "or `.data` replaced it. What steps the one does not train the other: call "
                "jd.functionalize again after that.",
                stacklevel=4,
            )
            return


def capturable(modules: list[tuple[str, str]]) -> None:
    """Check, while a step is compiled, that there are no `recurrent` modules."""
    if modules and torch.compiler.is_compiling():
        name, kind = modules[0]
        where = f"`model.{name}`" if name else "`model`"
        remedy = f"Loop over nn.{kind}Cell, or do not compile the step."
        fail(ValueError, where, "be a module that torch.compile can capture", kind, remedy)


def _sharded(module: nn.Module) -> bool:
    """Say whether the parameters of a module are sharded over processes."""
    return any(kind.__name__ in SHARDING for kind in type(module).__mro__)


def _wrapped(module: nn.Module) -> bool:
    """Say whether a module distributes another one."""
    return any(kind.__name__ in WRAPPERS for kind in type(module).__mro__)


def _compiled(module: nn.Module) -> bool:
    """Say whether a module was compiled by itself."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _hooked(module: nn.Module) -> bool:
    """Say whether hooks run in the backward pass of a module."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _sparse(module: nn.Module) -> bool:
    """Say whether an embedding has sparse gradients."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


def _renormalised(module: nn.Module) -> bool:
    """Say whether an embedding overwrites its weight in the forward pass."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def _lazy(module: nn.Module) -> bool:
    """Say whether a module does not know its shapes yet."""
    return any(isinstance(param, UninitializedParameter) for param in module._parameters.values())


_REFUSED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        _wrapped,
        "not be a wrapper that distributes a module",
        "Pass model.module, and wrap the rule in jd.distributed.data_parallel.",
    ),
    (_sharded, "not be sharded over processes", SHARDED),
    (_compiled, "not be compiled by itself", "Pass the original module, and compile the step."),
    (
        _hooked,
        "have no backward hooks, which torch.func does not run",
        "Remove the hooks, and look at what jd.jac or jd.grad returns.",
    ),
    (
        _sparse,
        "have dense gradients (sparse=False)",
        "Make the embedding without sparse=True.",
    ),
    (
        _renormalised,
        "not overwrite its weight (max_norm=None)",
        "Normalise what the embedding returns, or the weight after each step.",
    ),
    (_lazy, "know its shapes", "Run the model once on an example."),
)
