"""What the functions of a rule return: types and shapes alone, so that a call stays cheap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchjd_func._check._messages import describe, fail

_RESULT = {"Weighting": "weights", "Aggregator": "grads", "Scalarizer": "loss"}


def pair(rule: Any, value: Any) -> Any:
    """Return what an `update_fn` returned, after a check that it is a result and a state."""
    if not isinstance(value, tuple) or len(value) != 2:
        result = _RESULT[type(rule).__name__]
        remedy = f"Return both, `{result}` first; the state is () where nothing is remembered."
        rule_ = f"return ({result}, state)"
        fail(TypeError, f"`update_fn` of `{rule.name}`", rule_, _listed(value), remedy)
    return value


def weights(method: str, value: Any, m: int) -> None:
    """Check that a weighting returned a number for each gradient."""
    if isinstance(value, Tensor) and value.shape == (m,):
        return
    kind = ValueError if isinstance(value, Tensor) else TypeError
    remedy = (
        "A function for jd.stateless returns the weights alone; an `update_fn` returns "
        "(weights, state), in this order."
    )
    rule = f"be a tensor of shape ({m},), one for each gradient"
    fail(kind, f"the weights that `{method}` returns", rule, _listed(value), remedy)


def grads(method: str, value: Any, leaves: Sequence[Any], jac: Sequence[Tensor]) -> None:
    """Check that an aggregator returned a tree of the leaves of one row.

    Dimensions of all leaves, and the numbers of the first, are counted: shapes take microseconds.
    """
    alike = len(leaves) == len(jac) and _one_less(leaves, jac)
    if alike and leaves[0].numel() * jac[0].size(0) == jac[0].numel():
        return
    name = f"the direction that `{method}` returns"
    rule = "be a pytree like the Jacobian, each leaf (m, ...) without its first dimension"
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in jac)
    got = ", ".join(map(describe, leaves)) if leaves else _listed(value)
    remedy = (
        "Aggregate each leaf, by optree.tree_map(fn, jac) with fn from (m, ...) to (...), and "
        "return (grads, state), in this order."
    )
    fail(ValueError, name, rule, f"{got} for leaves of shape {shapes}", remedy)


def _one_less(leaves: Sequence[Any], jac: Sequence[Tensor]) -> bool:
    """Say whether leaves have a dimension less than others."""
    pairs = zip(leaves, jac, strict=True)
    return all([isinstance(leaf, Tensor) and leaf.ndim + 1 == of.ndim for leaf, of in pairs])


def loss(method: str, value: Any) -> None:
    """Check that a scalarizer returned one number."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return
    kind = ValueError if isinstance(value, Tensor) else TypeError
    remedy = "Reduce the vector of losses, e.g. by .sum(), and return (loss, state), in this order."
    fail(kind, f"the loss that `{method}` returns", "be a 0-d tensor", _listed(value), remedy)


def state_leaf(value: Any) -> None:
    """Check that a state that a rule returned is of tensors."""
    if not isinstance(value, Tensor):
        remedy = "Keep numbers as tensors, counters too: losses.new_zeros(()) in `init_fn`."
        fail(TypeError, "the next state", "hold tensors", describe(value), remedy)


def dependent_loss(method: str, tracked: bool) -> None:
    """Check that the one loss of a scalarizer can be differentiated."""
    if not tracked:
        remedy = "Detach weights at most, never losses: (weights.detach() * losses).sum()."
        name = f"the loss that `{method}` returns"
        fail(ValueError, name, "depend on the losses", "a constant of them", remedy)


def _listed(value: Any) -> str:
    """Describe a value, and what is in it if it is a short tuple."""
    if type(value) is tuple and len(value) <= 3:
        return f"({', '.join(map(_listed, value))}{',' if len(value) == 1 else ''})"
    return describe(value)
