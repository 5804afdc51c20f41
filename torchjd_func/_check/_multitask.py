"""What objectives of tasks that share features are given, and the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchjd_func import _tree
from torchjd_func._check._messages import describe, differentiable, fail, place
from torchjd_func._check._objectives import names


def disjoint(shared: Sequence[Tensor], paths: Sequence[str], heads: Sequence[Tensor]) -> None:
    """Check that no parameter is both shared and of a head."""
    places = {place(leaf) for leaf in shared} - {None}
    for path, leaf in zip(paths, heads, strict=True):
        if any(leaf is other for other in shared) or place(leaf) in places:
            name, rule = "the parameters of the heads", "not be shared parameters as well"
            remedy = "Let the trunk return what the head needs of it as another feature."
            fail(ValueError, name, rule, f"the same tensor at {path!r}", remedy)


def features(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that the shared features can be differentiated."""
    if not leaves:
        remedy = "Return a tensor, or a pytree of tensors, from the trunk."
        fail(ValueError, "the features", "hold at least one tensor", "an empty pytree", remedy)
    remedy = "Return other tensors as the auxiliary output, or take them from the batch."
    differentiable("the features", paths, leaves, remedy)


def head_weights(weights: Tensor | None) -> Tensor:
    """Return the weights that are to scale the gradients of the heads."""
    if weights is None:
        rule, got = "be False for a method without a weighting", "True"
        fail(ValueError, "`scale_heads`", rule, got, "Use a method that weighs the gradients.")
    return weights


def multitask_params(value: Any, heads: Any) -> tuple[Any, Any]:
    """Return shared and head parameters of a multi-task objective."""
    if not isinstance(value, tuple) or len(value) != 2:
        name, rule = "`params` of a multi-task objective", "be (shared, {name: head_params})"
        fail(ValueError, name, rule, describe(value), "Pass a pair, after the state.")
    names("head_params", value[1], heads)
    paths, leaves = _tree.paths(value[1]), _tree.leaves(value[1])
    remedy = "Pass what is not differentiated as a part of the batch."
    differentiable("the parameters of the heads", paths, leaves, remedy)
    return value


def trained_params(value: Any, heads: Any) -> tuple[Any, Any]:
    """Return shared and head parameters, of which some are shared."""
    params = multitask_params(value, heads)
    if not _tree.leaves(params[0]):
        name, rule = "the shared parameters of a multi-task objective", "hold at least one tensor"
        remedy = (
            "With a frozen trunk tasks share nothing that is trained, and no rule has anything to "
            "decide: call backward() on the sum of the losses, or unfreeze a part of the trunk "
            "before jd.functionalize."
        )
        fail(ValueError, name, rule, "none", remedy)
    return params


def heads(value: Any) -> None:
    """Check that there are heads by name."""
    if not isinstance(value, Mapping):
        fail(TypeError, "`heads`", "be a dict", type(value).__name__, "Pass {name: head}.")
    if not value:
        fail(ValueError, "`heads`", "have at least one task", "none", "Pass {name: head}.")
