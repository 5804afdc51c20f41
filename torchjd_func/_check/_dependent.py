"""Losses and heads that nothing would train, said before nothing trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchjd_func._check._messages import fail


def dependent(tracked: bool) -> None:
    """Check that some loss depends on what is differentiated."""
    if not tracked:
        rule, got = "depend on the differentiated argument", "losses that are constants of it"
        remedy = (
            "Call apply(params, ...) of jd.functionalize, or functional_call(model, params, ...), "
            "not model(...), and detach nothing on the way."
        )
        fail(ValueError, "`losses`", rule, got, remedy)


def not_hooked(hooked: bool) -> None:
    """Check that no hook is registered where examples are mapped over in a graph."""
    if hooked:
        rule = "register no hooks on tensors in a graph that maps over examples"
        remedy = "Write the losses of a whole batch, for jd.instancewise, or leave the hook out."
        fail(ValueError, "the objective", rule, "x.register_hook(...)", remedy)


def each_dependent(paths: Sequence[str], tracked: Sequence[bool]) -> None:
    """Warn of losses that are constants, which no step can improve."""
    _warn(
        [path for path, kept in zip(paths, tracked, strict=True) if not kept],
        "Losses {} are constants of the differentiated argument, so their gradients "
        "are 0, and nothing trains them. Compute them by apply(params, ...), detach nothing on "
        "the way, or say by `present` that a batch does not have them.",
    )


def each_trains(by_features: Mapping[str, bool], by_own: Mapping[str, bool]) -> None:
    """Warn of heads that train the trunk, or themselves, not at all."""
    _warn(
        [name for name, kept in by_features.items() if not kept and by_own[name]],
        "Losses of the heads {} are constants of the features, so their gradients by the "
        "shared parameters are 0. Detach nothing on the way, or leave such heads out of the "
        "objective.",
    )
    _warn(
        [name for name, kept in by_own.items() if not kept and by_features[name]],
        "Losses of the heads {} are constants of the parameters of these, and nothing "
        "trains them. Compute them by apply(params, ...) of jd.functionalize, not by a module; "
        "give heads without parameters an empty dict.",
    )


def passed(names: Sequence[str]) -> None:
    """Warn of arguments with a past of plain autograd, through which nothing is trained."""
    _warn(
        names,
        "The arguments {} of the objective were computed from tensors that require a gradient, "
        "which a step does not train through them. Compute them in the objective, all modules by "
        "one jd.functionalize((trunk, head)); or say that they are constants, by x.detach() or "
        "torch.no_grad().",
    )


def trained_state(names: Sequence[str]) -> None:
    """Warn of leaves of a state that are to be trained, where nothing trains them."""
    _warn(
        names,
        "Tensors {} of the state require a gradient, but the parameters alone are differentiated, "
        "so this trains no state. Differentiate rule(losses, state)[0] by both, as in the "
        "docstring of jd.scalarizers.uw; or pass a state without, x.detach().",
    )


def trained_options(shapes: Sequence[torch.Size]) -> None:
    """Warn of options of a rule that are to be trained, where nothing trains them."""
    _warn(
        [tuple(shape) for shape in shapes],
        "Options of the rule require a gradient, tensors of shapes {}, but what jd.grad returns is "
        "a value, so nothing trains them. Multiply losses in the objective by weights that are "
        "trained, and pass these beside the params; or make the rule with x.detach().",
    )


def inside(shapes: Sequence[torch.Size]) -> None:
    """Warn of tensors that plain autograd would train, and that are not differentiated."""
    _warn(
        [tuple(shape) for shape in shapes],
        "Losses depend on tensors that require a gradient and are not differentiated, of shapes "
        "{}, so this step does not train them. Make all that is trained an argument: all modules "
        "by one jd.functionalize((trunk, head)), called by apply(params, ...), and weights of "
        "losses beside the params. Of a constant, or of a network that another step trains, say "
        "so: by requires_grad_(False), torch.no_grad(), or a jd.functionalize of its own.",
    )


def inside_target(shapes: Sequence[torch.Size]) -> None:
    """Warn of parameters that `loss.backward()` would train, and that are not in the target."""
    _warn(
        [tuple(shape) for shape in shapes],
        "Losses depend on parameters that are not in `target`, of shapes {}, so this call does "
        "not train them. Pass all modules, as in (trunk, head). What another step trains, as the "
        "discriminator of a GAN, switch off while losses are computed, by requires_grad_(False); "
        "of what another pass through the same losses trains, pass retain_graph=True.",
    )


def kept_buffers(names: Sequence[str]) -> None:
    """Warn of buffers that a module overwrote, and that come out of no objective."""
    _warn(
        names,
        "The modules of the objective overwrote the buffers {}, which it does not return: they "
        "stay as they were, and model.eval() will use them. Return (losses, buffers), pass "
        "has_aux=True, and load what comes out by model.load_state_dict(buffers, strict=False); or "
        "call model.eval() on what should keep its statistics.",
    )


def _warn(names: Sequence[Any], text: str) -> None:
    """Warn the caller of a check, if there is anything to name; not in a graph."""
    if names and not torch.compiler.is_compiling():
        warnings.warn(text.format(names), stacklevel=3)
