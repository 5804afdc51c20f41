"""States as flat dicts of tensors, the one thing that is safe to load from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchjd_func import _check, _tree

PyTree = Any


def state_dict(state: PyTree) -> dict[str, Tensor]:
    """Return the tensors of a state by name, for `torch.save`.

    Or for `torch.distributed.checkpoint.save`, on all ranks, with sharded parameters beside the
    state of the rule. What loads writes into the tensors that it is given, so give it new ones; the
    number of ranks and the placements may be others than at saving:

        target = {name: torch.empty_like(x) for name, x in jd.interop.state_dict(fresh).items()}
        torch.distributed.checkpoint.load(target, checkpoint_id=path)
        state = jd.interop.load_state_dict(fresh, target)

    Args:
        state: Pytree of tensors: the state of a rule, the parameters of an optimiser, or several of
            both in a dict.

    Returns:
        `{name: tensor}`, such as `{"inner.weights": ...}`, sharing memory with the state. It can be
        loaded with `torch.load(..., weights_only=True)`.

    Raises:
        TypeError: If the state holds other than tensors.
        ValueError: If two tensors have the same name.

    Example:
        >>> import torch, torchjd_func as jd
        >>> state = jd.smoothed(jd.mgda()).init(torch.ones(2, 3))
        >>> {name: tuple(tensor.shape) for name, tensor in jd.interop.state_dict(state).items()}
        {'weights': (2,), 'step': ()}
    """
    names, leaves = _tree.names(state), _tree.leaves(state)
    _check.tensors("state", names, leaves)
    _check.unique_names("state", names)
    return dict(zip(names, (leaf.detach() for leaf in leaves), strict=True))


def load_state_dict(like: PyTree, saved: Mapping[str, Tensor]) -> PyTree:
    """Return a state with the tensors of a dict.

    Args:
        like: A state of the same structure, such as a fresh one of `jd.init_state`; its structure,
            shapes, dtypes and devices are kept, its numbers are not used.
        saved: From `state_dict`.

    Returns:
        A state like `like`, on its devices. Nothing is changed.

    Raises:
        ValueError: If names are missing or unexpected, or a shape or dtype differs.

    Example:
        >>> import torch, torchjd_func as jd
        >>> fresh = jd.smoothed(jd.mgda()).init(torch.ones(2, 3))
        >>> saved = {"weights": torch.ones(2).double(), "step": torch.tensor(5)}
        >>> jd.interop.load_state_dict(fresh, saved).step
        tensor(5)
    """
    names = _tree.names(like)
    _check.names("saved", saved, names)
    leaves, rebuild = _tree.flatten(like)
    pairs = zip(names, leaves, strict=True)
    return rebuild([_placed(name, saved[name], leaf) for name, leaf in pairs])


def _placed(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that fits, on the device where it belongs."""
    _check.same_shape("saved", name, tensor, like)
    _check.same_dtype("saved", name, tensor, like)
    return tensor.detach().to(like.device)
