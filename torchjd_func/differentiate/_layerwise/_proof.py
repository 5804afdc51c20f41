"""Prove that what layers say of an objective is so, by one plain backward pass.

For any weights w, the product w' G w of a leaf's Gramian is the squared length of its plain
gradient of the weighted losses, and the pullback of w is that gradient. Both hold only if every use
of the leaf was seen, has the right form, and examples do not mix.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._gates import some
from torchjd_func.differentiate._layerwise._layers import (
    Layers,
    combine,
    gramians,
    layers,
    rule_names,
)
from torchjd_func.differentiate._layerwise._noise import scattered
from torchjd_func.differentiate._layerwise._record import Recorded


def failing(recorded: Recorded) -> dict[int, str] | None:
    """Return the leaves whose rows are not right, with the operations that use them.

    `None` if gradients are zero or not finite, so that nothing is known.
    """
    vector = _tree.ravel(recorded.outputs)
    places = sorted(set(range(recorded.mode.count)) - set(recorded.plan.opaque))
    found = layers(recorded, torch.ones_like(vector), None, len(vector))
    groups = tuple((leaf,) for leaf in places)
    weights = scattered(vector) + 0.1
    wide = weights.to(_tree.accumulation_dtype(weights.dtype))
    try:
        matrices = gramians(found, groups)
        pulled = combine(found, wide.expand(len(groups), -1), groups)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return dict.fromkeys(places, f"an operation whose form fails: {str(error).splitlines()[0]}")
    cotangent = _tree.unravel(recorded.outputs, weights)
    plain = recorded.pull(cotangent, False, places)[1]
    gaps, scales = zip(*map(partial(_gap, wide), matrices, pulled, plain), strict=True)
    sizes = torch.stack([scale.to(wide.device) for scale in scales])
    total = sizes.amax()
    idle = not some(total > 0) and not found.pieces.keys().isdisjoint(places)
    if idle or some(~torch.isfinite(sizes)):
        return None
    guilty, excused = {}, {}
    for leaf, gap, scale in zip(places, gaps, scales, strict=True):
        tol, floor = _tolerance(recorded, found, leaf)
        if some(gap > tol * scale):
            rounding = not some(gap > tol * scale + floor * total.to(gap.device))
            names = rule_names(found, leaf) or "an operation that was not seen"
            (excused if rounding else guilty)[leaf] = names
    return guilty | excused if guilty else {}


def _tolerance(recorded: Recorded, found: Layers, leaf: int) -> tuple[float, float]:
    """Return the tolerances of the least precise dtype of the run, as autocast mixes them.

    Returns:
        Parts of the leaf's terms, and of the largest leaf's: a gradient of zero is rounding alone.
    """
    tensors = [
        found.values[leaf],
        *found.cotangents,
        *(x for use in found.uses for x in use.arrays),
    ]
    dtypes = {x.dtype for x in tensors if x.is_floating_point() or x.is_complex()}
    dtype = max(dtypes | recorded.plan.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    tol = _TOLERANCES.get(dtype, 1e-3)
    return tol, min(1e3 * torch.finfo(dtype).eps, tol)


def _gap(weights: Tensor, matrix: Tensor, own: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far a leaf is from its plain gradient, and the size of the terms."""
    own, plain = (_tree.real(x).flatten().to(matrix.dtype) for x in (own, plain))
    weights = weights.to(matrix.dtype)
    length = plain.norm()
    scale = length + weights.abs() @ matrix.diagonal().clamp(min=0).sqrt()
    squares = (weights @ matrix @ weights - length**2).abs() / torch.where(scale > 0, scale, 1)
    return torch.maximum((own - plain).norm(), squares), scale


_TOLERANCES = {
    torch.float64: 1e-7,
    torch.complex128: 1e-7,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
