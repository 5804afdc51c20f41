"""What all transforms do at a call: values in, values out, and the reserved keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._precision import full_precision
from torchjd_func._shares import Part, Rows, Size, same
from torchjd_func.differentiate._autocast import around
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._linearized import Linearized, counting
from torchjd_func.differentiate._objective import as_objective
from torchjd_func.differentiate._outside import check_passed
from torchjd_func.differentiate._request import Request

PyTree = Any


def linearize(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Request,
    state: PyTree = (),
) -> Linearized:
    """Let an objective linearize itself at some arguments, with the options of a transform."""
    _check.flag("has_aux", options.has_aux)
    _check.where(options.where)
    objective = as_objective(fn)
    named = dict(kwargs)
    present, size = named.pop("present", None), named.pop("size", None)
    for name, value in (("present", present), ("size", size)):
        if value is not None:
            _check.reserved(fn, name, len(args))
    _check.spans_once(options.spans, objective)
    spans = options.spans or objective.spans_processes
    _check.size(size, spans)
    if not objective.spans_processes:
        _check_whole(args, options.argnums)
    check_devices((args, named))
    values = detached((args, named))
    if not options.alone:
        check_passed(args, named, values, options.argnums)
    request = options._replace(
        args=values[0],
        kwargs=values[1],
        present=present,
        part=_part(args, named, options, state, size) if spans else Part(size),
        autocast=around(),
    )
    with full_precision():
        linear = objective.linearize(request)
        return counting(linear, request.part) if options.spans else linear


def without_losses(run: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Return a transformed function that leaves the losses of another away."""

    def transformed(*args: Any, **kwargs: Any) -> Any:
        """Return what the other does, but the losses."""
        result, out = run(*args, **kwargs)
        return (result, out[1]) if has_aux else result

    return transformed


def check_devices(given: Any) -> None:
    """Check that arguments without numbers, of a model that is on no device yet, are so alike."""
    if any(x.is_meta for x in _tree.tensors(given)):
        _check.one_device("the arguments of the objective", _tree.leaves(given), _tree.paths(given))


def _check_whole(args: tuple[Any, ...], argnums: int | tuple[int, ...]) -> None:
    """Check that nothing that is differentiated is sharded."""
    differentiated = _differentiated(args, argnums)
    leaves = _tree.leaves(differentiated)
    if any(type(leaf) not in (Tensor, torch.nn.Parameter) for leaf in leaves):
        _check.not_sharded(_tree.paths(differentiated), leaves)


def _part(
    args: tuple[Any, ...], named: dict[str, Any], options: Request, state: PyTree, size: Size
) -> Part:
    """Return what this process has of a batch, and what it has like the others.

    That is the state of the rule or, where there is none yet, the parameters.
    """
    if state is not None:
        alike = {} if options.spans else same("state", state)  # or the rule compares it
    else:
        alike = same("parameters", _differentiated(args, options.argnums))
    alike["rule options"] = options.rule
    return Part(size, _lengths(args, named, options.argnums), alike)


def _differentiated(args: tuple[Any, ...], argnums: int | tuple[int, ...]) -> PyTree:
    """Return what is differentiated."""
    places = _check.argnums(argnums, len(args))
    several = isinstance(argnums, tuple)
    return {str(i): args[i] for i in places} if several else args[places[0]]


def _lengths(
    args: tuple[Any, ...], named: dict[str, Any], argnums: int | tuple[int, ...]
) -> dict[str, Rows]:
    """Return the length of each tensor that is not differentiated."""
    places = _check.argnums(argnums, len(args))
    rest = {str(i): arg for i, arg in enumerate(args) if i not in places} | named
    pairs = zip(_tree.paths(rest), _tree.leaves(rest), strict=True)
    return {path: Rows(x) for path, x in pairs if isinstance(x, Tensor) and x.ndim}
