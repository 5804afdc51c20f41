"""What methods for a set of models are given: a first dimension that counts the models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from torchjd_func._check._messages import describe, differentiable, fail, holds_numbers, one_device
from torchjd_func._check._methods import floating
from torchjd_func._check._options import positions, real

STACK = "Stack the models with jd.ensemble.stack and map jd.jac over them with torch.func.vmap."


def set_jacobians(method: str, paths: Callable[[], Sequence[str]], leaves: Sequence[Any]) -> None:
    """Check that all `leaves` are floating and share their two leading dimensions."""
    name = f"the Jacobians given to `{method}`"
    if not leaves:
        fail(ValueError, name, "hold at least one tensor", "an empty pytree", STACK)
    differentiable(name, paths(), leaves, "Leave constants out of it.")
    for path, leaf in zip(paths(), leaves, strict=True):
        if leaf.ndim < 2 or leaf.shape[:2] != leaves[0].shape[:2] or 0 in leaf.shape[:2]:
            got = f"{describe(leaf)} at {path!r}"
            rule = "have leading dimensions (k, m), neither 0, in all leaves"
            fail(ValueError, name, rule, got, STACK)


def set_gramians(method: str, value: Any) -> None:
    """Check that a method is given one floating `(m, m)` matrix for each model."""
    name = f"the Gramians given to `{method}`"
    if not isinstance(value, Tensor):
        remedy = "For Jacobians call the rule, not its weighting."
        fail(TypeError, name, "be a tensor", describe(value), remedy)
    if value.ndim != 3 or value.shape[1] != value.shape[2]:
        remedy = "For Jacobians call the rule; for several sets use torch.func.vmap."
        fail(ValueError, name, "have shape (k, m, m)", describe(value), remedy)
    floating(name, value)


def set_losses(method: str, value: Any, like: Tensor) -> Tensor:
    """Return the losses of all models, `(k, m)`, beside their Gramians."""
    k, m = like.shape[:2]
    name, remedy = f"the losses given to `{method}`", "Pass what jd.jac_and_value returns with it."
    if not isinstance(value, Tensor):
        fail(TypeError, name, "be a tensor", describe(value), remedy)
    if tuple(value.shape) != (k, m):
        fail(ValueError, name, f"have shape ({k}, {m})", describe(value), remedy)
    floating(name, value)
    one_device(f"{name}, and the gradients,", [value, like])
    return value


def preferences(value: Any) -> Tensor:
    """Return a preference vector for each model, `(k, m)`."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        remedy = "Pass one row for each model, such as torch.eye(m)."
        fail(ValueError, "`preferences`", "be a tensor of shape (k, m)", describe(value), remedy)
    floating("`preferences`", value)
    return real("preferences", value, (2,), "be a tensor of shape (k, m)")


def preference_for_each(value: Tensor, k: int, m: int) -> None:
    """Check that there is a preference vector for each model."""
    if tuple(value.shape) != (k, m):
        rule, remedy = f"have shape ({k}, {m}), a row for each model", "Add or drop rows."
        fail(ValueError, "`preferences`", rule, describe(value), remedy)


def same_members(paths: Sequence[str], leaves: Sequence[Any]) -> int:
    """Return the number of models that all stacked tensors share."""
    remedy = "Stack what differs with jd.ensemble.stack; name in `shared` what all models share."
    if not leaves:
        rule = "be given a stacked tensor"
        fail(ValueError, "a function of an ensemble", rule, "none", remedy)
    rule = "have one leading dimension k > 0 in all leaves, dense tensors"
    for path, leaf in zip(paths, leaves, strict=True):
        if not _is_stacked(leaf) or leaf.shape[0] != leaves[0].shape[0] or not len(leaf):
            got = f"{describe(leaf)} at {path!r}"
            fail(ValueError, "what an ensemble is given", rule, got, remedy)
    return leaves[0].shape[0]


def shared(value: Any, n_args: int, names: Collection[str]) -> set[int | str]:
    """Return the positions, and names, of the arguments that all models share."""
    wanted = value if isinstance(value, tuple) else (value,)
    named = {name for name in wanted if isinstance(name, str)}
    if not named <= set(names):
        rule = f"name some of the keyword arguments {sorted(names)}"
        remedy = "Pass by position what is shared by position, and by name what is shared by name."
        fail(ValueError, "`shared`", rule, sorted(named - set(names)), remedy)
    places = tuple(place for place in wanted if not isinstance(place, str))
    remedy = "Pass what is shared by position, or give the name that it is passed by."
    return {*positions("shared", places, n_args, remedy), *named}


def _is_stacked(leaf: Any) -> bool:
    """Say whether a leaf is a dense tensor with a first dimension."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and holds_numbers(leaf)


def stackable(
    trees: Sequence[tuple[Any, Sequence[Any]]], same_structure: Callable[[Any, Any], bool]
) -> None:
    """Check that models are of one structure, and their leaves of the same shapes."""
    if not trees:
        fail(ValueError, "`trees`", "hold at least one model", "none", "Pass a list of pytrees.")
    remedy = "Only models of one architecture can be stacked."
    first, leaves = trees[0]
    for i, (tree, others) in enumerate(trees):
        if not same_structure(first, tree):
            fail(ValueError, "`trees`", "have one structure", f"another at {i}", remedy)
        for leaf, other in zip(leaves, others, strict=True):
            if not isinstance(other, Tensor):
                remedy = "Pass the parameters of modules, jd.functionalize(module)[1], and tensors."
                fail(TypeError, "`trees`", "hold tensors only", f"{describe(other)} at {i}", remedy)
            if leaf.shape != other.shape:
                got = f"{tuple(leaf.shape)} at 0 and {tuple(other.shape)} at {i}"
                fail(ValueError, "`trees`", "have leaves of the same shapes", got, remedy)
