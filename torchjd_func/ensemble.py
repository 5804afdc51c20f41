"""Many models in one program: parameters and states stacked along a first dimension.

    params = jd.ensemble.init(make_params, jd.random.key(0), k)     # a model for each key
    step = jd.ensemble.each(step, shared=(2,))                      # the step of one model, mapped
    params, states = step(params, states, batch)                    # may be compiled

A member may differ from the others in anything that is a tensor: its seed, its preference vector,
its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func.random import split

__all__ = ["each", "init", "stack", "unstack"]

PyTree = Any


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stack the parameters or the states of several models.

    Args:
        trees: `k` pytrees of tensors, of one structure and with leaves of the same shapes.

    Returns:
        The pytree of `(k, ...)` tensors.

    Raises:
        ValueError: If there are none, or they differ in structure or shapes.

    Example:
        >>> import torch, torchjd_func as jd
        >>> models = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]
        >>> jd.ensemble.stack(models)
        {'w': tensor([[0., 0.],
                      [1., 1.]])}
    """
    _check.stackable([(tree, _tree.leaves(tree)) for tree in trees], _tree.same_structure)
    return _tree.stack(list(trees))


def unstack(tree: PyTree) -> list[PyTree]:
    """Return the parameters or the states of each model of an ensemble.

    Args:
        tree: Pytree of `(k, ...)` tensors.

    Returns:
        `k` pytrees of tensors; views, not copies.

    Raises:
        ValueError: If leaves differ in their first dimension.

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.ensemble.unstack({"w": torch.tensor([[0.0, 1.0], [2.0, 3.0]])})
        [{'w': tensor([0., 1.])}, {'w': tensor([2., 3.])}]
    """
    _check.same_members(_tree.paths(tree), _tree.leaves(tree))
    return _tree.cut(Tensor.unbind, tree)


def init(fn: Callable[[Tensor], PyTree], key: Tensor, k: int) -> PyTree:
    """Make `k` models, or states, from one key.

    Args:
        fn: `key -> pytree of tensors`, for one model; it is vmapped, so random numbers come from
            `jd.random`.
        key: `(2,)`, from `jd.random.key`; split into one for each model.
        k: How many.

    Returns:
        The pytree of `(k, ...)` tensors; what does not depend on the key is repeated.

    Raises:
        ValueError: If `key` is not a key, or `k` is not positive.

    Example:
        >>> import torchjd_func as jd
        >>> make_params = lambda key: {"w": jd.random.normal(key, (3,))}
        >>> params = jd.ensemble.init(make_params, jd.random.key(0), 4)
        >>> tuple(params["w"].shape)
        (4, 3)
    """
    _check.key(key)
    return each(fn)(split(key, _check.integer("k", k)))


def each(
    fn: Callable[..., PyTree],
    shared: int | str | tuple[int | str, ...] = (),
    *,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., PyTree]:
    """Map the function of one model over the models of an ensemble.

    `fn` may be a whole training step, in which rules are made from what differs: seeds,
    preferences, hyper-parameters. `torch.compile` goes outside.

    Args:
        fn: `fn(*args, **kwargs) -> pytree of tensors`, for one model; pure. Random numbers come
            from keys.
        shared: Positions, or names, of arguments that all models are given as they are, such as
            the batch: `shared=(2, "present")`.
        chunk_size: How many models are computed at a time, to bound the memory of what is
            temporary; `None` for all.
        randomness: What dropout and other draws from torch's global generator do: `"error"`,
            `"different"` (each model draws its own), or `"same"`.

    Returns:
        `f(*args, **kwargs)`: each argument that is not shared a pytree of `(k, ...)` tensors
        (`None` and empty containers may be in it), and so is the result.

    Raises:
        TypeError: From `f`, if `shared` are neither positions nor names.
        ValueError: If `chunk_size` is not positive, or `randomness` none of these; from `f`, if
            leading dimensions differ, or `shared` names no argument.

    Example:
        >>> import torch, torchjd_func as jd
        >>> losses = lambda x, y: torch.stack([(x - y).square().sum(), x.square().sum()])
        >>> def step(preference, x, y):
        ...     grads, _ = jd.grad(losses, jd.upgrad(preference))(None, x, y)
        ...     return x - 0.1 * grads
        >>> preferences = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
        >>> jd.ensemble.each(step, shared=2)(preferences, torch.ones(2, 1), torch.tensor([0.5]))
        tensor([[0.8900],
                [0.8500]])
    """
    _check.chunk_size(chunk_size)
    _check.choice("randomness", randomness, ("error", "different", "same"))
    mapping = partial(vmap, chunk_size=chunk_size, randomness=randomness)
    return partial(_each, fn, shared, mapping)


def _each(
    fn: Callable[..., PyTree],
    shared: int | str | tuple[int | str, ...],
    mapping: Callable[..., Any],
    /,
    *args: PyTree,
    **kwargs: PyTree,
) -> PyTree:
    """Map over the tensors of arguments; torch.func counts `None` as a leaf, and cannot map it."""
    constant = _check.shared(shared, len(args), kwargs)
    places = {**dict(enumerate(args)), **kwargs}
    mapped = {str(place): arg for place, arg in places.items() if place not in constant}
    flat, rebuild = _tree.flatten(mapped)
    _check.same_members(_tree.paths(mapped), flat)
    box: list[Callable[[Any], PyTree]] = []

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        """Compute one member, and leave behind the structure of the result."""
        own = rebuild(list(leaves))
        given = {place: own.get(str(place), arg) for place, arg in places.items()}
        member = fn(*(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})
        parts, put_back = _tree.flatten(member)
        box.append(put_back)
        return tuple(parts)

    parts = mapping(one)(*flat)
    return box[-1](list(parts))
