"""Every error text of the library, in one style: what must hold, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import qpsolvers
import torch
from torch import Tensor


def preference(preference: Tensor | Sequence[float] | None) -> Tensor | None:
    """Return `preference` as a 1-D tensor (or `None`)."""
    return None if preference is None else vector("preference", preference)


def vector(name: str, value: Tensor | Sequence[float]) -> Tensor:
    """Return `value` as a 1-D floating tensor."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if tensor.ndim != 1:
        raise ValueError(
            f"`{name}` must be 1-D, with one number for each objective, "
            f"got shape {tuple(tensor.shape)}. To sweep several, use torch.func.vmap over them."
        )
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def length(name: str, value: Tensor, m: int) -> None:
    """Check that `value` has one entry for each of the `m` objectives."""
    if value.shape[-1] != m:
        raise ValueError(
            f"`{name}` must have one entry for each of the {m} objectives, "
            f"got {value.shape[-1]}. Objectives are counted in leaf order of the losses."
        )


def square(method: str, statistic: Tensor) -> None:
    """Check that `statistic` is one `(m, m)` floating matrix."""
    if not isinstance(statistic, Tensor):
        raise TypeError(
            f"`{method}` must be given the Gramian as a tensor, got {type(statistic).__name__}. "
            "For a Jacobian pytree call the aggregator, not its weighting."
        )
    if statistic.ndim != 2 or statistic.shape[0] != statistic.shape[1]:
        raise ValueError(
            f"`{method}` must be given a Gramian of shape (m, m), got {tuple(statistic.shape)}. "
            "For a Jacobian call the aggregator; for a batch of Gramians use torch.func.vmap."
        )
    floating(f"{method}: the Gramian", statistic)


def floating(name: str, value: Tensor) -> None:
    """Check that `value` has a real floating-point dtype."""
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must have a floating-point dtype, got {value.dtype}. Convert it with .float()."
        )


def jacobian(method: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that all `leaves` are floating and share their leading dimension."""
    if not leaves:
        raise ValueError(
            f"`{method}` must be given a Jacobian with at least one tensor, got an empty pytree. "
            "Pass the pytree that jd.jac returns."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"`{method}` must be given floating-point tensors, got {found} at {path!r}. "
                "Leave constants out of the Jacobian."
            )
        if leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                f"`{method}` must be given leaves of one leading dimension m, got shape "
                f"{tuple(leaf.shape)} at {path!r}. The first dimension counts the objectives."
            )


def params(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that `leaves` can be differentiated."""
    if not leaves:
        raise ValueError(
            f"{name} must hold at least one floating-point tensor, got an empty pytree. "
            "Check `argnums`, or pass the parameters of jd.functionalize."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"{name} must hold floating-point tensors only, got {found} at {path!r}. "
                "Pass it as another argument, which is not differentiated."
            )


def argnums(argnums: Any, n_args: int) -> tuple[int, ...]:
    """Return `argnums` as a tuple of non-negative positions."""
    wanted = argnums if isinstance(argnums, tuple) else (argnums,)
    for index in wanted:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(
                f"`argnums` must be an int or a tuple of ints, got {argnums!r}. "
                "Name positions, not argument names."
            )
        if not -n_args <= index < n_args:
            raise ValueError(
                f"`argnums` must name one of the {n_args} positional arguments, got {index}. "
                "Differentiated arguments are passed by position."
            )
    positions = tuple(index % n_args for index in wanted)
    if not positions or len(set(positions)) != len(positions):
        raise ValueError(
            f"`argnums` must name each argument once and at least one, got {argnums!r}. "
            "Use 0 for the first argument."
        )
    return positions


def chunk_size(chunk_size: int | None) -> None:
    """Check a number of cotangents at a time."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(
            f"`chunk_size` must be a positive int or None, got {chunk_size!r}. "
            "Use 1 for a loop, None for the method's own choice."
        )


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        allowed = ", ".join(repr(option) for option in choices)
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}. Choose one of these.")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return a hyper-parameter; a Python number has to lie in a range, a tensor is not read."""
    if not isinstance(value, Tensor) and not low <= value <= high:
        raise ValueError(
            f"`{name}` must be between {low:g} and {high:g}, got {value}. "
            "Choose a number in that range."
        )
    return value


def integer(name: str, value: Any, low: int) -> int:
    """Return a hyper-parameter that counts something."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(
            f"`{name}` must be an int of at least {low}, got {value!r}. It is part of the shape of "
            "the computation, so it cannot be a tensor."
        )
    return value


def enough_objectives(method: str, m: int, least: int, rule: str) -> None:
    """Check that a method that sets objectives aside has enough of them."""
    if m < least:
        raise ValueError(
            f"`{method}` must be given at least {least} objectives ({rule}), got {m}. "
            "Set fewer aside, or use jd.mean()."
        )


def losses(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that what an objective returned can be differentiated."""
    if not leaves or all(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in leaves):
        raise ValueError(
            "`losses` must hold at least one number, got none. "
            "Return a tensor, or a pytree of tensors, from the objective."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"`losses` must be tensors, got {type(leaf).__name__} at {path!r}. "
                "With an auxiliary output, return (losses, aux) and pass has_aux=True."
            )
        floating(f"`losses` at {path!r}", leaf)


def losses_vector(method: str, losses: Tensor | None, m: int) -> None:
    """Check the `losses` handed to a method beside its statistic."""
    if losses is not None and tuple(losses.shape) != (m,):
        raise ValueError(
            f"`losses` of `{method}` must have shape ({m},), one for each objective, "
            f"got {tuple(losses.shape)}. Flatten them in leaf order."
        )


def losses_present(method: str, losses: Tensor | None) -> Tensor:
    """Return the `losses` that `method` cannot do without."""
    if losses is None:
        raise ValueError(
            f"`{method}` must be given the losses, got None. "
            "Call it with losses=..., or through jd.grad, which passes them."
        )
    return losses


def aux_pair(out: Any) -> tuple[Any, Any]:
    """Return the `(losses, aux)` of an objective with an auxiliary output."""
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"`fn` must return (losses, aux) when has_aux=True, got {type(out).__name__}. "
            "Return a pair, or drop has_aux."
        )
    return out


def rule(rule: Any, types: tuple[type, ...]) -> None:
    """Check that `rule` is of one of the core types."""
    if not isinstance(rule, types):
        names = " or ".join(f"jd.{kind.__name__}" for kind in types)
        raise TypeError(
            f"`rule` must be a {names}, got {type(rule).__name__}. "
            "Call the factory, e.g. jd.upgrad(); lift a jd.Weighting with jd.weighted."
        )


def combinable(combinator: str, rule: Any, types: tuple[type, ...]) -> None:
    """Check that a combinator is given a rule of a type that it can wrap."""
    if not isinstance(rule, types):
        names = " or ".join(f"jd.{kind.__name__}" for kind in types)
        raise TypeError(
            f"`{combinator}` must be given a {names}, got {rule!r}. "
            "Call the factory first, e.g. jd.upgrad()."
        )


def weighting_present(combinator: str, name: str, weighting: Any) -> Any:
    """Return the weighting that a combinator works through."""
    if weighting is None:
        raise ValueError(
            f"`{combinator}` must be given a rule with a weighting, got `{name}`, which needs the "
            "rows of the Jacobian. Wrap a method whose `.weighting` is not None."
        )
    return weighting


def key(key: Any) -> None:
    """Check that `key` was made by `torchjd_func.random`."""
    if not isinstance(key, Tensor) or key.shape != (2,) or key.dtype != torch.int64:
        found = (
            f"shape {tuple(key.shape)} and dtype {key.dtype}"
            if isinstance(key, Tensor)
            else type(key).__name__
        )
        raise ValueError(
            f"`key` must be an int64 tensor of shape (2,), got {found}. "
            "Make one with jd.random.key(seed); for a batch of keys use torch.func.vmap."
        )


def key_present(method: str, key: Tensor | None) -> Tensor:
    """Return the `key` that the random `method` cannot do without."""
    if key is None:
        raise ValueError(
            f"`key` must be given to `{method}`, which draws random numbers, got None. "
            "Call init(..., key=jd.random.key(0)) and pass the state on."
        )
    return key


def state(method: str, field: str, value: Any, shape: Sequence[int]) -> None:
    """Check that a tensor of the state has the size of this problem."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`state.{field}` of `{method}` must have shape {tuple(shape)}, got {found}. "
            "A state belongs to one number of objectives and parameters: call init again."
        )


def state_type(method: str, state: Any, kind: type) -> None:
    """Check that a state was made by the `init` of this method."""
    if not isinstance(state, kind):
        raise ValueError(
            f"`state` of `{method}` must be a {kind.__name__}, got {type(state).__name__}. "
            "Pass the state that this method's init returned."
        )


def state_structure(method: str, field: str, same: bool) -> None:
    """Check that a pytree of the state has the structure of the Jacobian."""
    if not same:
        raise ValueError(
            f"`state.{field}` of `{method}` must have the structure of the Jacobian, got another "
            "one. A state belongs to one pytree of parameters: call init again."
        )


def stateless(method: str, state: Any) -> None:
    """Check that a method without state is handed none."""
    if state != ():
        raise ValueError(
            f"`state` of `{method}` must be (), since it keeps none, got {type(state).__name__}. "
            "Pass the state that this method's init returned."
        )


def names(kind: str, given: Any, expected: Any) -> None:
    """Check that two sets of names are equal."""
    unknown, missing = sorted(set(given) - set(expected)), sorted(set(expected) - set(given))
    if unknown or missing:
        raise ValueError(
            f"`{kind}` must have exactly the expected names, got unknown {unknown} "
            f"and missing {missing}. Keep the names of the pytree it was made from."
        )


def same_shape(name: str, path: str, got: Tensor, want: Tensor) -> None:
    """Check that a leaf has the shape of its counterpart."""
    if got.shape != want.shape:
        raise ValueError(
            f"`{name}` must have shape {tuple(want.shape)} at {path!r}, got {tuple(got.shape)}. "
            "Pass the pytree that belongs to these parameters."
        )


def solver(name: str) -> str:
    """Return the name of a solver that is installed."""
    choice("solver", name, ("auto", *qpsolvers.available_solvers))
    return name


def matrix(name: str, value: Tensor) -> None:
    """Check that `value` is a floating matrix, or a batch of them, with as many rows as columns."""
    floating(f"`{name}`", value)
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        raise ValueError(
            f"`{name}` must have shape (..., m, m), got {tuple(value.shape)}. "
            "Pass a square matrix, e.g. a Gramian."
        )


def same_structure(name: str, same: bool) -> None:
    """Check that two pytrees were found to have one structure."""
    if not same:
        raise ValueError(
            f"`{name}` must have the structure of the parameters, got another one. "
            "Pass the pytree that jd.grad returned for these parameters."
        )
