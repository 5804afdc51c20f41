"""Gramians and pullbacks of an objective, layer by layer, from one pass through its activations.

Four steps, each in its place:

1. capture (`_capture`, with `_axes` and `_sources`): which operations use parameters, and on what;
2. rules (`_rules`, `_attention`, and `_local` for all else): the gradient rows of each use;
3. contraction (`_forms`): inner products and sums of rows that are kept as factors;
4. assembly (`_layers`): Gramians, rows and weighted gradients of whole parameters.
"""

from torchjd_func.differentiate._layerwise._capture import Layout, Plan, PlanChanged
from torchjd_func.differentiate._layerwise._layers import (
    Batch,
    Layers,
    combine,
    cross_gramians,
    gramians,
    jacobian,
    layers,
    record,
    scout,
)

__all__ = [
    "Batch",
    "Layers",
    "Layout",
    "Plan",
    "PlanChanged",
    "combine",
    "cross_gramians",
    "gramians",
    "jacobian",
    "layers",
    "record",
    "scout",
]
