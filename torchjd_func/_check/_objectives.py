"""What objectives are given and return, and the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from torchjd_func._check._messages import describe, differentiable, fail
from torchjd_func._check._methods import floating


def params(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that `leaves` can be differentiated."""
    if not leaves:
        remedy = "Check `argnums`, or pass the parameters of jd.functionalize."
        fail(ValueError, name, "hold at least one floating-point tensor", "an empty pytree", remedy)
    differentiable(name, paths, leaves, "Pass what is not differentiated as another argument.")


def losses(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that what an objective returned can be differentiated."""
    if not any(not isinstance(leaf, Tensor) or leaf.numel() > 0 for leaf in leaves):
        remedy = "Return a tensor, or a pytree of tensors, from the objective."
        fail(ValueError, "`losses`", "hold at least one number", "none", remedy)
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            remedy = "With an auxiliary output, return (losses, aux) and pass has_aux=True."
            got = f"{describe(leaf)} at {path!r}"
            fail(TypeError, "`losses`", "be tensors", got, remedy)
        floating(f"`losses` at {path!r}", leaf)


def aux_pair(out: Any) -> tuple[Any, Any]:
    """Return the `(losses, aux)` of an objective with an auxiliary output."""
    if not isinstance(out, tuple) or len(out) != 2:
        rule, remedy = "return (losses, aux) when has_aux=True", "Return a pair, or drop has_aux."
        fail(TypeError, "`fn`", rule, describe(out), remedy)
    return out


def two_batches(args: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
    """Return leading arguments and the two batches that follow them."""
    *leading, batch_1, batch_2 = args if len(args) >= 3 else (None, None)
    if not leading or not isinstance(batch_1, tuple) or not isinstance(batch_2, tuple):
        rule = "be the last two arguments, each a tuple of arguments of the objective"
        got = [type(arg).__name__ for arg in args]
        fail(ValueError, "`batch_1, batch_2`", rule, got, "Call f(params, (x_1,), (x_2,)).")
    return leading, batch_1, batch_2


def multitask_params(value: Any, heads: Any) -> tuple[Any, Any]:
    """Return shared and head parameters of a multi-task objective."""
    if not isinstance(value, tuple) or len(value) != 2:
        name, rule = "`params` of a multi-task objective", "be (shared, {name: head_params})"
        fail(ValueError, name, rule, describe(value), "Pass a pair.")
    names("head_params", value[1], heads)
    return value


def names(kind: str, given: Iterable[str], expected: Iterable[str]) -> None:
    """Check that two sets of names are equal."""
    unknown, missing = sorted(set(given) - set(expected)), sorted(set(expected) - set(given))
    if unknown or missing:
        got = f"unknown {unknown} and missing {missing}"
        remedy = "Keep the names of the pytree it was made from."
        fail(ValueError, f"`{kind}`", "have exactly the expected names", got, remedy)


def same_structure(name: str, same: bool) -> None:
    """Check that two pytrees were found to have one structure."""
    if not same:
        remedy = "Pass the pytree that jd.grad returned for these parameters."
        fail(ValueError, f"`{name}`", "have the structure of the parameters", "another", remedy)


def same_shape(name: str, path: str, got: Tensor, want: Tensor) -> None:
    """Check that a leaf has the shape of its counterpart."""
    if got.shape != want.shape:
        rule = f"have shape {tuple(want.shape)} at {path!r}"
        remedy = "Pass the pytree that belongs to these parameters."
        fail(ValueError, f"`{name}`", rule, tuple(got.shape), remedy)
