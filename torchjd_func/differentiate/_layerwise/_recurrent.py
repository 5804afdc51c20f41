"""Recurrent layers, spelled out step by step in operations whose rules are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._functions import name_of

Apply = Callable[..., Any]
States = Sequence[Tensor]  # the hidden state, and the cell's if there is one


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    given: Tensor
    hidden: Tensor
    given_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None


def is_plain(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether a layer of padded sequences, or one step of it, is to be spelled out."""
    if not _is_padded(name, args, kwargs):
        return False
    # What is frozen is faster as it is; autocast has rules of its own
    weights = args[2:] if name.endswith("_cell") else args[2]
    trained = any([x is not None and x.requires_grad for x in weights])
    return trained and not torch.is_autocast_enabled(args[0].device.type)


def _is_padded(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether it is a layer or a step of padded sequences."""
    if name not in RECURRENT or kwargs or not isinstance(args[0], Tensor):
        return False
    cell = name.endswith("_cell")
    return args[0].ndim == (2 if cell else 3) and (cell or isinstance(args[2], (list, tuple)))


def on_device(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Spell a layer out on a GPU, where gradients of cuDNN do not vmap (torch 2.13)."""
    name = str(name_of(func))
    if not (_is_padded(name, args, kwargs) and args[0].is_cuda):
        return func(*args, **kwargs)
    kind = args[0].device.type
    if torch.is_autocast_enabled(kind):  # casts all of it, states too
        dtype = torch.get_autocast_dtype(kind)
        args = _tree.map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, args)
    with torch.autocast(kind, enabled=False):
        return recurrent(_plainly, name, args)


def _plainly(func: Callable[..., Any], *args: Any) -> Any:
    """Run an operation."""
    return func(*args)


def address(func: Callable[..., Any], x: Tensor) -> Any:
    """Let addresses be compared, as recurrent layers on a GPU do, where none can be read."""
    inner = torch.func.debug_unwrap(x)
    return func(x) if inner is x else (func(inner),)


def unmoved(func: Callable[..., Any], *args: Any) -> None:
    """Leave weights where they are, which cuDNN would move to one piece of memory."""


def recurrent(apply: Apply, name: str, args: Sequence[Any]) -> Any:
    """Compute what the function of that name does, each operation through `apply`."""
    step, several = _STEPS[name.removesuffix("_cell")], name.startswith("lstm")
    start = list(args[1]) if several else [args[1]]
    if name.endswith("_cell"):
        weights = Weights(*args[2:])
        states = _next(apply, step, _projected(apply, step, args[0], weights), start, weights)
        return tuple(states) if several else states[0]
    x, _, flat, biased, count, dropout, training, both, batch_first = args
    x = apply(torch.transpose, x, 0, 1) if batch_first else x
    size = len(flat) // (count * (2 if both else 1))
    ends: list[States] = []
    for layer in range(count):
        outputs = []
        for backwards in (False, True) if both else (False,):
            place = len(ends)
            weights = _weights(flat[place * size : (place + 1) * size], biased)
            states = [apply(Tensor.select, state, 0, place) for state in start]
            output, end = _sequence(apply, step, x, states, weights, backwards)
            outputs.append(output)
            ends.append(end)
        x = apply(torch.cat, outputs, -1) if both else outputs[0]
        if dropout and training and layer < count - 1:
            x = apply(F.dropout, x, dropout)
    x = apply(torch.transpose, x, 0, 1) if batch_first else x
    return x, *(apply(torch.stack, list(parts)) for parts in zip(*ends, strict=True))


def _weights(flat: Sequence[Tensor], biased: bool) -> Weights:
    """Return the parameters of a layer by name; that of a projection is the last."""
    biases = (flat[2], flat[3]) if biased else (None, None)
    projection = flat[-1] if len(flat) > (4 if biased else 2) else None
    return Weights(flat[0], flat[1], *biases, projection)


def _sequence(
    apply: Apply, step: Apply, x: Tensor, states: States, weights: Weights, backwards: bool
) -> tuple[Tensor, States]:
    """Go through sequences `(t, b, d)`.

    Returns:
        The hidden states `(t, b, h)`, and the states at the end.
    """
    parts = list(apply(torch.unbind, _projected(apply, step, x, weights)))
    outputs = []
    for part in reversed(parts) if backwards else parts:
        states = _next(apply, step, part, states, weights)
        outputs.append(states[0])
    return apply(torch.stack, outputs[::-1] if backwards else outputs), states


def _projected(apply: Apply, step: Apply, x: Tensor, weights: Weights) -> Tensor:
    """Return what is added at all steps."""
    x = apply(F.linear, x, weights.given, weights.given_bias)
    bias, _ = _hidden_biases(step, weights)
    return x if bias is None else apply(torch.add, x, bias)


def _hidden_biases(step: Apply, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """Return the bias of hidden states that is added once for all steps, and that at each."""
    bias = weights.hidden_bias
    return (None, bias) if step is _gru else (bias, None)  # of a GRU's a part is multiplied


def _next(apply: Apply, step: Apply, x: Tensor, states: States, weights: Weights) -> States:
    """Return the states after one step, of two operations."""
    _, bias = _hidden_biases(step, weights)
    states = apply(step, x, apply(F.linear, states[0], weights.hidden, bias), *states)
    if weights.projection is None:
        return states
    return apply(F.linear, states[0], weights.projection), *states[1:]


def _tanh(x: Tensor, hidden: Tensor, state: Tensor) -> States:
    return (torch.tanh(x + hidden),)


def _relu(x: Tensor, hidden: Tensor, state: Tensor) -> States:
    return (torch.relu(x + hidden),)


def _lstm(x: Tensor, hidden: Tensor, state: Tensor, cell: Tensor) -> States:
    taken, kept, new, shown = (x + hidden).chunk(4, -1)
    cell = kept.sigmoid() * cell + taken.sigmoid() * new.tanh()
    return shown.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, hidden: Tensor, state: Tensor) -> States:
    (reset, kept, new), others = x.chunk(3, -1), hidden.chunk(3, -1)
    new = torch.tanh(new + (reset + others[0]).sigmoid() * others[2])
    return (torch.lerp(new, state, (kept + others[1]).sigmoid()),)


_STEPS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
RECURRENT = frozenset(_STEPS) | {f"{name}_cell" for name in _STEPS}
