"""Gramians and pullbacks of an objective, layer by layer, from one pass through its activations.

Four steps, each in its place:

1. capture (`_watch`, `_scout`, `_record`): which operations use parameters, and on what;
2. rules (`_rules`, `_attention`, and `_local` for all else): the gradient rows of each use;
3. contraction (`_forms`): inner products and sums of rows that are kept as factors;
4. assembly (`_layers`): Gramians, rows and weighted gradients of whole parameters.
"""

from torchjd_func.differentiate._layerwise._attention import Spelled
from torchjd_func.differentiate._layerwise._functions import name_of
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
from torchjd_func.differentiate._layerwise._plan import Layout, Plan
from torchjd_func.differentiate._layerwise._planner import Larger, Problem, plan, run
from torchjd_func.differentiate._layerwise._ranks import Ranks
from torchjd_func.differentiate._layerwise._record import Batch, Recorded

__all__ = [
    "Batch",
    "Larger",
    "Layers",
    "Layout",
    "Plan",
    "Problem",
    "Ranks",
    "Recorded",
    "Spelled",
    "combine",
    "cross_gramians",
    "gramians",
    "jacobian",
    "layers",
    "leaf_costs",
    "name_of",
    "plan",
    "rule_names",
    "run",
    "spread",
]
