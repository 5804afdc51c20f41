"""Batches of several processes, filled up to one length: collectives exchange equal shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._shares import step_of
from torchjd_func.differentiate._layerwise import Ranks
from torchjd_func.differentiate._request import Request, bind

if TYPE_CHECKING:
    from torchjd_func.differentiate._instancewise import InstanceWise


def filled(fn: InstanceWise, ranks: Ranks, request: Request) -> tuple[InstanceWise, Request]:
    """Return the objective and the request of batches of one length.

    What was added does not count. With `size`, examples after the first `size` are absent.
    """
    size, dims = request.part.size, _dims(fn, request)
    length = _length(request, dims)
    order = repr(bind(request).paths)
    step = step_of(request.part, request.present, rule="jd.distributed.gathered", order=order)
    if torch.compiler.is_compiling():  # one length, with a size too
        fn = replace(fn, ranks=_agreed(ranks, {**step, "batch": request.part.lengths}))
    if torch.compiler.is_compiling() or ranks.lengths is None:
        return fn, request if size is None else _first(request, size, length)
    known = length if size is None else -1 if isinstance(size, Tensor) else size
    every = ranks.lengths([length, known], step)
    _check.at_most(every)
    lengths = [count for count, _ in every]
    if any(pair[0] != pair[1] for pair in every):
        request = _first(request, size, length)
    longest = max(lengths)
    if min(lengths) == longest:
        return fn, request
    places = [i * longest + k for i, count in enumerate(lengths) for k in range(count)]
    kept = torch.tensor(places, device=_tree.tensors(request.args)[0].device)
    whole = request.present is None
    if whole and min(lengths) == 0:  # zeros of which losses may be no numbers
        request = _first(request, length, length)
    ranks = ranks._replace(kept=kept, padded=longest, whole=whole)
    return replace(fn, ranks=ranks), _grown(request, dims, length, longest)


def _agreed(ranks: Ranks, step: Any) -> Ranks:
    """Return who exchanges numbers once a step is the same on all processes."""
    if ranks.agree is None:
        return ranks
    gather, after = ranks.gather, ranks.agree(step)
    return ranks._replace(gather=lambda x: gather(after(x)))


def _dims(fn: InstanceWise, request: Request) -> dict[int, int]:
    """Return the axis of examples of each argument that has any, by its place."""
    places = _check.argnums(request.argnums, len(request.args))
    in_dims = fn.in_dims if fn.example is None else fn.example.dims(len(request.args))
    dims = (0,) * len(request.args) if in_dims is None else in_dims
    pairs = enumerate(zip(request.args, dims, strict=True))
    return {
        place: dim
        for place, (arg, dim) in pairs
        if place not in places and isinstance(dim, int) and _tree.tensors(arg)
    }


def _length(request: Request, dims: dict[int, int]) -> int:
    """Return the number of examples, which the last argument that has any shows."""
    for place in sorted(dims, reverse=True):
        for x in _tree.tensors(request.args[place]):
            if x.ndim > dims[place]:
                return x.shape[dims[place]]
    return 0


def _first(request: Request, size: Any, length: int) -> Request:
    """Return the request of the first `size` examples; the others are absent."""
    device = _tree.tensors(request.args)[0].device
    first = torch.arange(length, device=device) < size
    present = _present.as_mask("a gathered objective", request.present, length, device)
    return request._replace(present=first if present is None else first & present)


def _grown(request: Request, dims: dict[int, int], length: int, longest: int) -> Request:
    """Return the request with examples added to its batch."""
    args = list(request.args)
    for place, dim in dims.items():
        more = partial(grow, dim=dim, length=length, longest=longest)
        args[place] = _tree.map(more, args[place])
    present = request.present
    if present is not None:
        device = _tree.tensors(args)[0].device
        mask: Any = _present.as_mask("a gathered objective", present, length, device)
        present = torch.cat([mask, mask.new_zeros(longest - length)])
    return request._replace(args=tuple(args), present=present)


def grow(leaf: Any, dim: int, length: int, longest: int) -> Any:
    """Add zeros to a tensor of as many examples; the last example again, if there is one."""
    if not isinstance(leaf, Tensor) or leaf.ndim <= dim or leaf.shape[dim] != length:
        return leaf
    shape = [*leaf.shape[:dim], longest - length, *leaf.shape[dim + 1 :]]
    like = leaf.narrow(dim, length - 1, 1).expand(shape) if length else leaf.new_zeros(shape)
    return torch.cat([leaf, like], dim)
