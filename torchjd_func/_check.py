"""Every error text of the library, in one style: what must hold, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import qpsolvers
import torch
from torch import Tensor


def fail(kind: type[Exception], name: str, rule: str, got: Any, remedy: str) -> NoReturn:
    """Raise the one kind of message: `name` must <rule>, got <value>. <what to do>."""
    raise kind(f"{name} must {rule}, got {got}. {remedy}")


def describe(value: Any) -> str:
    """Describe a value that is not what it should be."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return type(value).__name__


def choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in tuple(choices):
        allowed = "be one of " + ", ".join(repr(option) for option in choices)
        fail(ValueError, f"`{name}`", allowed, repr(value), "Choose one of these.")


def interval(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """Return a number that lies in an interval; a tensor is returned unread, `None` too."""
    if value is None or isinstance(value, Tensor):
        return value
    open_high = open_high or high == math.inf
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        rule = f"be in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        fail(ValueError, f"`{name}`", rule, value, "Pass a number of that range.")
    return value


def solver(name: str) -> str:
    """Return the name of a solver that is installed."""
    if name != "auto":
        choice("solver", name, ("auto", *qpsolvers.available_solvers))
    return name


def chunk_size(value: int | None) -> None:
    """Check a number of cotangents at a time."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        remedy = "Use 1 for a loop, None for the method's own choice."
        fail(ValueError, "`chunk_size`", "be a positive int or None", repr(value), remedy)


def argnums(value: Any, n_args: int) -> tuple[int, ...]:
    """Return `argnums` as a tuple of non-negative positions."""
    wanted = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in wanted):
        remedy = "Name positions, not argument names."
        fail(TypeError, "`argnums`", "be an int or a tuple of ints", repr(value), remedy)
    if not all(-n_args <= index < n_args for index in wanted):
        rule = f"name some of the {n_args} positional arguments"
        fail(ValueError, "`argnums`", rule, value, "Pass what is differentiated by position.")
    positions = tuple(index % n_args for index in wanted)
    if not positions or len(set(positions)) != len(positions):
        rule, remedy = "name at least one argument, each once", "Use 0 for the first argument."
        fail(ValueError, "`argnums`", rule, value, remedy)
    return positions


def preference(value: Tensor | Sequence[float] | None) -> Tensor | None:
    """Return `preference` as a 1-D tensor (or `None`)."""
    return None if value is None else vector("preference", value)


def vector(name: str, value: Tensor | Sequence[float]) -> Tensor:
    """Return `value` as a 1-D floating tensor; Python numbers become float64."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if tensor.ndim != 1:
        remedy = "To sweep several, use torch.func.vmap over them."
        fail(
            ValueError, f"`{name}`", "be 1-D, a number for each objective", describe(tensor), remedy
        )
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def length(name: str, value: Tensor, m: int) -> None:
    """Check that `value` has one entry for each of the `m` objectives."""
    if value.shape[-1] != m:
        rule = f"have one entry for each of the {m} objectives"
        remedy = "Objectives are counted in leaf order of the losses."
        fail(ValueError, f"`{name}`", rule, value.shape[-1], remedy)


def floating(name: str, value: Tensor) -> None:
    """Check that `value` has a real floating-point dtype."""
    if not value.is_floating_point():
        fail(TypeError, name, "be floating-point", value.dtype, "Convert it with .float().")


def matrix(name: str, value: Tensor) -> None:
    """Check that `value` is a floating square matrix, or a batch of them."""
    floating(f"`{name}`", value)
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        remedy = "Pass a square matrix, e.g. a Gramian."
        fail(ValueError, f"`{name}`", "have shape (..., m, m)", describe(value), remedy)


def square(method: str, statistic: Tensor) -> None:
    """Check that a weighting is given one `(m, m)` floating matrix."""
    name = f"the Gramian given to `{method}`"
    if not isinstance(statistic, Tensor):
        remedy = "For a Jacobian pytree call the aggregator, not its weighting."
        fail(TypeError, name, "be a tensor", describe(statistic), remedy)
    if statistic.ndim != 2 or statistic.shape[0] != statistic.shape[1]:
        remedy = "For a Jacobian call the aggregator; for several Gramians use torch.func.vmap."
        fail(ValueError, name, "have shape (m, m)", describe(statistic), remedy)
    floating(name, statistic)


def jacobian(method: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that all `leaves` are floating and share their leading dimension."""
    name = f"the Jacobian given to `{method}`"
    if not leaves:
        remedy = "Pass the pytree that jd.jac returns."
        fail(ValueError, name, "hold at least one tensor", "an empty pytree", remedy)
    _differentiable(name, paths, leaves, "Leave constants out of it.")
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0]:
            rule, got = (
                "have one leading dimension m in all leaves",
                f"{describe(leaf)} at {path!r}",
            )
            fail(ValueError, name, rule, got, "The first dimension counts the objectives.")


def losses_vector(method: str, losses: Tensor | None, m: int) -> None:
    """Check the `losses` handed to a method beside its statistic."""
    if losses is not None and tuple(losses.shape) != (m,):
        rule, remedy = f"have shape ({m},)", "Flatten them in leaf order."
        fail(ValueError, f"the losses given to `{method}`", rule, describe(losses), remedy)


def losses_present(method: str, losses: Tensor | None) -> Tensor:
    """Return the `losses` that `method` cannot do without."""
    if losses is None:
        remedy = "Call it with losses=..., or through jd.grad, which passes them."
        fail(ValueError, f"`{method}`", "be given the losses", "None", remedy)
    return losses


def key(value: Any) -> None:
    """Check that a key was made by `torchjd_func.random`."""
    if not isinstance(value, Tensor) or value.shape != (2,) or value.dtype != torch.int64:
        remedy = "Make one with jd.random.key(seed); for several use torch.func.vmap."
        fail(ValueError, "`key`", "be an int64 tensor of shape (2,)", describe(value), remedy)


def key_present(method: str, value: Tensor | None) -> Tensor:
    """Return the key that the random `method` cannot do without."""
    if value is None:
        rule = f"be given to `{method}`, which draws random numbers"
        remedy = "Call init(..., key=jd.random.key(0)) and pass the state on."
        fail(ValueError, "`key`", rule, "None", remedy)
    key(value)
    return value


def state(method: str, field: str, value: Any, shape: Sequence[int]) -> None:
    """Check that a tensor of the state has the size of this problem."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        name, rule = f"`state.{field}` of `{method}`", f"have shape {tuple(shape)}"
        remedy = "A state belongs to one size of problem: call init again."
        fail(ValueError, name, rule, describe(value), remedy)


def stateless(method: str, value: Any) -> None:
    """Check that a method without state is handed none."""
    if value != ():
        remedy = "Pass the state that this method's init returned."
        fail(ValueError, f"`state` of `{method}`", "be ()", describe(value), remedy)


def rule(value: Any, types: tuple[type, ...]) -> None:
    """Check that a rule is of one of the core types."""
    if not isinstance(value, types):
        names = " or ".join(f"jd.{kind.__name__}" for kind in types)
        remedy = "Call the factory, e.g. jd.upgrad(); lift a jd.Weighting with jd.weighted."
        fail(TypeError, "`rule`", f"be a {names}", type(value).__name__, remedy)


def params(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that `leaves` can be differentiated."""
    if not leaves:
        remedy = "Check `argnums`, or pass the parameters of jd.functionalize."
        fail(ValueError, name, "hold at least one floating-point tensor", "an empty pytree", remedy)
    _differentiable(name, paths, leaves, "Pass what is not differentiated as another argument.")


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


def _differentiable(name: str, paths: Sequence[str], leaves: Sequence[Any], remedy: str) -> None:
    """Check that all leaves are floating or complex tensors."""
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            got = f"{describe(leaf)} at {path!r}"
            fail(TypeError, name, "hold floating-point tensors only", got, remedy)


def state_type(method: str, value: Any, kind: type) -> None:
    """Check that a state was made by the `init` of this method."""
    if not isinstance(value, kind):
        remedy = "Pass the state that this method's init returned."
        fail(ValueError, f"`state` of `{method}`", f"be a {kind.__name__}", describe(value), remedy)
