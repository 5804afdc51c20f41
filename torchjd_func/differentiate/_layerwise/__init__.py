"""Gramians and pullbacks of an objective, layer by layer, from one pass through its activations.

Four steps, each in its place:

1. capture (`_watch`, `_scout`, `_record`): which operations use parameters, and on what;
2. rules (`_rules`, `_attention`, and `_local` for all else): the gradient rows of each use;
3. contraction (`_forms`): inner products and sums of rows that are kept as factors;
4. assembly (`_layers`): Gramians, rows and weighted gradients of whole parameters.
"""

from torchjd_func.differentiate._layerwise._layers import (
    Layers,
    combine,
    cross_gramians,
    gramians,
    jacobian,
    layers,
    leaf_costs,
    rule_names,
    spread,
)
from torchjd_func.differentiate._layerwise._ranks import Ranks
from torchjd_func.differentiate._layerwise._record import PlanChanged
from torchjd_func.differentiate._layerwise._run import Batch, Recorded, record, scout
from torchjd_func.differentiate._layerwise._watch import Layout, Plan

__all__ = [
    "Batch",
    "Layers",
    "Layout",
    "Plan",
    "PlanChanged",
    "Ranks",
    "Recorded",
    "combine",
    "cross_gramians",
    "gramians",
    "jacobian",
    "layers",
    "leaf_costs",
    "record",
    "rule_names",
    "scout",
    "spread",
]
