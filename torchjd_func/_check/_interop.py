"""What loops of plain autograd hand over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchjd_func._check._messages import at, describe, fail
from torchjd_func._check._objectives import names

REDUCERS = {
    "DistributedDataParallel": (
        "Its hooks, which average gradients, do not run here: run and pass the module inside, "
        "`model.module`, and wrap the rule in jd.distributed.data_parallel."
    ),
    "FullyShardedDataParallel": "Use jd.distributed.sharded.",
    "FSDPModule": "Use jd.distributed.sharded.",
}


def local(path: str, modules: Iterable[nn.Module]) -> None:
    """Check that no module reduces its gradients by hooks of its own."""
    for module in modules:
        for kind in type(module).__mro__:
            if kind.__name__ in REDUCERS:
                rule = "not be wrapped for several processes"
                remedy = REDUCERS[kind.__name__]
                fail(ValueError, at("target", path), rule, kind.__name__, remedy)


def leaf_parameter(name: str, path: str, value: Any) -> None:
    """Check that a target has a `.grad` that optimisers read."""
    where = at(name, path)
    if not isinstance(value, Tensor):
        remedy = "Pass modules, or the parameters of modules."
        fail(TypeError, where, "be a parameter or a module", describe(value), remedy)
    if not value.is_leaf:
        remedy = (
            "Pass the parameter that it was computed from, whose `.grad` optimisers read. Losses "
            "come first: backward_(losses, model, rule, state)."
        )
        fail(
            ValueError, where, "be a leaf, such as a parameter", "the result of a function", remedy
        )


def trainable(params: Sequence[Any]) -> None:
    """Check that there is something to train, and that it is whole."""
    if any(hasattr(param, "placements") for param in params):
        remedy = "Use jd.distributed.sharded."
        fail(ValueError, "`target`", "hold parameters of one process", "a DTensor", remedy)
    if not params:
        remedy = (
            "Pass the model itself, with parameters of requires_grad=True: those of "
            "jd.functionalize are detached from it."
        )
        rule = "hold parameters that require a gradient"
        fail(ValueError, "`target`", rule, "none", remedy)


def grads_by_name(value: Any, params: Iterable[str]) -> None:
    """Check that gradients of a module have names of its parameters."""
    if not isinstance(value, Mapping):
        remedy = "Unpack what the step returned: grads, losses, state = step(...)."
        fail(TypeError, "`grads`", "be a dict by name", describe(value), remedy)
    names("grads", value, params, partly=True)


def grads_structure(grads: Any, target: Any, same: bool) -> None:
    """Check that gradients have the structure of what is to have them."""
    if not same:
        kinds = describe(grads), describe(target)
        got = f"{kinds[0]} for {kinds[1]}" if kinds[0] != kinds[1] else "other names"
        remedy = (
            "Pass what is trained, then what jd.grad returned for it: of a dict by the names of "
            "jd.functionalize that is the module itself, as in assign_grads_(model, grads)."
        )
        fail(ValueError, "`grads`", "have the structure of the target", got, remedy)


_FROZEN = "It was frozen since jd.functionalize: call that again, or leave it out of `grads`."
_DETACHED = (
    "Pass the model itself: the parameters of jd.functionalize are detached from it, and no "
    "optimizer has them."
)


def assignable(path: str, param: Tensor, grad: Any) -> None:
    """Check that a gradient fits its parameter."""
    if not isinstance(grad, Tensor):
        remedy = "Pass the pytree that jd.grad returned for these parameters."
        fail(ValueError, at("grads", path), "be a tensor or None", describe(grad), remedy)
    if not param.requires_grad:
        rule = f"require a gradient at {path!r}"
        remedy = _FROZEN if isinstance(param, nn.Parameter) else _DETACHED
        fail(ValueError, "`target`", rule, "requires_grad=False", remedy)
    if grad.shape != param.shape:
        rule, remedy = (
            f"have shape {tuple(param.shape)} at {path!r}",
            "Pass what belongs to these parameters and losses.",
        )
        fail(ValueError, "`grads`", rule, tuple(grad.shape), remedy)
    if grad.is_complex() and not param.is_complex():
        rule, remedy = f"be real at {path!r}, as the parameter is", "Pass its real part, grad.real."
        fail(TypeError, "`grads`", rule, grad.dtype, remedy)


def optimizer(value: Any) -> None:
    """Check that there are groups of parameters."""
    if not hasattr(value, "param_groups"):
        remedy = "Call it once for each of several optimizers, with the parameters of that one."
        fail(TypeError, "`optimizer`", "be an optimizer of torch.optim", describe(value), remedy)


def owned(path: str, is_owned: bool) -> None:
    """Check that an optimiser steps a parameter."""
    if not is_owned:
        remedy = (
            "Make the optimizer from these parameters, after model.to(...), or add them by its "
            "add_param_group. Of several optimizers give each the gradients of its own, {name: "
            "grads[name] for name in ...}, or leave `optimizer` out."
        )
        got = "one that it does not have"
        fail(ValueError, at("target", path), "be a parameter of `optimizer`", got, remedy)


def reaches(name: str, path: str, depends: bool) -> None:
    """Check that a loss can be differentiated with respect to what is trained."""
    if not depends:
        where = at(name, path)
        remedy = (
            "Compute it by the modules of `target`, outside torch.no_grad() and without detach(); "
            "say by `present` that a batch does not have it."
        )
        rule = "depend on parameters of `target` that require a gradient"
        fail(ValueError, where, rule, "none of them", remedy)


def visible(node: str) -> None:
    """Check that a node of the graph does not hide parameters from it."""
    if node == "CheckpointFunctionBackward":
        rule = "not be computed by reentrant checkpoints, which hide their parameters"
        remedy = "Call torch.utils.checkpoint.checkpoint with use_reentrant=False."
        fail(ValueError, "`losses`", rule, node, remedy)


def apart(path: str, other_ways: bool) -> None:
    """Check that a loss reaches shared parameters through the features alone."""
    if other_ways:
        rule = "reach the parameters that `features` depend on through `features` alone"
        remedy = "Pass all tensors that the heads take from the trunk as `features`."
        fail(ValueError, at("losses", path), rule, "another way", remedy)


def independent_feature(path: str, independent: bool) -> None:
    """Check that a feature is not computed from another one."""
    if not independent:
        rule, got = "not be computed from another feature", "one that is"
        remedy = "Hand the heads a copy of the other, feature.clone(), and pass that."
        fail(ValueError, at("features", path), rule, got, remedy)


def unscaled(name: str, spans: bool) -> None:
    """Check that a gradient scaler is not used with a rule over several processes."""
    if spans:
        rule, remedy = "be left out with a rule over several processes", "Train in bfloat16."
        fail(ValueError, "`scaler`", rule, f"one, and `{name}`", remedy)
