"""States as flat dicts of tensors, the one thing that is safe to load from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func._types import Weighting
from torchjd_func.interop import _layout

Rule = Any  # an Aggregator, a Weighting, a Scalarizer, or one of jd.sets
State = Any
FORMAT = 1
HEADER = "torchjd_func"  # the entry that holds method, format and structure, as the bytes of JSON


def state_dict(rule: Rule, state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by name, for `torch.save`.

    Or for `torch.distributed.checkpoint.save`, on all processes, beside sharded parameters. What
    loads there writes into the tensors that it is given; it is told by the file which these are, or
    by a fresh state, whose number of processes and placements may be others than at saving:

        read = {name: torch.empty_like(x) for name, x in jd.interop.state_dict(rule, fresh).items()}
        torch.distributed.checkpoint.load(read, checkpoint_id=path)
        state = jd.interop.load_state_dict(rule, read)

    Args:
        rule: The rule that the state belongs to; of one made by `jd.distributed`, the rule inside,
            so that the state can be loaded for another number of processes.
        state: What its `init` or its last call returned.

    Returns:
        `{name: tensor}`, such as `{"inner.weights": ...}`, sharing memory with the state; and one
        more tensor, `"torchjd_func"`, with the method's name, the format and the structure. It can
        be loaded with `torch.load(..., weights_only=True)`.

    Raises:
        TypeError: If the state holds other than tensors in named tuples, dicts, lists and tuples.
        ValueError: If it is the state of another rule, or two tensors have the same name.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.smoothed(jd.mgda())
        >>> saved = jd.interop.state_dict(rule, rule.init(torch.ones(2, 3)))
        >>> {name: tuple(saved[name].shape) for name in ["weights"]}
        {'weights': (2,)}
    """
    _check.has_state(rule)
    _check_state(rule, state)
    tensors: dict[str, Tensor] = {}
    structure = _layout.describe(state, tensors)
    _check.unique_names("state", [*tensors, HEADER])
    text = json.dumps({"format": FORMAT, "rule": rule.name, "state": structure})
    return {HEADER: torch.tensor(list(text.encode()), dtype=torch.uint8), **tensors}


def load_state_dict(rule: Rule, saved: Mapping[str, Tensor]) -> State:
    """Return the state that was saved, for the same rule.

    No batch is needed, and no fresh state. Only the named tuples of `rule` are made, and no code of
    the file is run.

    Args:
        rule: The method that the state was saved of; its options may have changed.
        saved: From `state_dict`.

    Returns:
        The state, with the tensors of `saved`, on their devices. Nothing is changed. Its size is
        compared with that of the losses at the next call of `rule`.

    Raises:
        ValueError: If it was saved of another method, in another format, or not by `state_dict`; if
            names are missing or unexpected, or a shape or dtype is not that of the saved state.

    Example:
        >>> import torch, torchjd_func as jd
        >>> rule = jd.smoothed(jd.mgda())
        >>> _, state = rule(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> saved = jd.interop.state_dict(rule, state)
        >>> jd.interop.load_state_dict(rule, saved).weights
        tensor([0.6400, 0.3600], dtype=torch.float64)
    """
    _check.has_state(rule)
    header = _header(saved)
    _check.saved_format(header.get("format"), FORMAT)
    _check.saved_rule(header.get("rule"), rule.name)
    _check.names("saved", saved, {HEADER, *_layout.names(header["state"])})
    state = _layout.rebuild(header["state"], saved, _layout.state_classes(rule))
    _check_state(rule, state)
    return state


def _check_state(rule: Rule, state: State) -> None:
    """Check that a state is of the type of the rule's, or of that of its weighting."""
    weighting = getattr(rule, "weighting", None)
    owner = weighting if isinstance(weighting, Weighting) else rule
    _check.state_of(owner.name, owner.init_fn, state)


def _header(saved: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what is known of a saved state."""
    if not isinstance(saved, Mapping):
        return _check.saved_header(saved)
    try:
        header = json.loads(bytes(saved[HEADER].tolist()))
    except (KeyError, TypeError, ValueError, AttributeError):
        header = {}
    return _check.saved_header(header)
