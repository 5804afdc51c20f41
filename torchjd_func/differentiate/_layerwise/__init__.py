"""Gramians and pullbacks of an objective, layer by layer, from one pass through its activations.

The way of a call:

1. `_planner.run` looks for a plan of an earlier run of the same shapes, or makes one: it watches
   the objective with one example more and with this batch (`_operations` sees where examples lie,
   `_order` whether integers of the data may change that), and `_decide` what each operation on
   parameters becomes: a use whose derivative has a form, a function of parameters alone
   (`_sources`), or nothing known.
2. `_record` runs the objective inside `torch.func.vjp`, watched by `_trace`, in graphs by `_graph`,
   which holds it against the plan (`_followed`). A parameter that autograd reaches on another way
   than through uses has all its rows by autograd. Attention and recurrent layers are spelled out
   (`_attention`, `_recurrent`). A run that goes another way than its `_plan` is planned again.
3. `_proof` holds a new plan against plain backward passes, at `_points` where noise (`_noise`,
   `_disturbed`) leaves nothing to coincidence. What fails is left to autograd.
4. `_layers` pulls ones back through activations alone. The rows of a use (`_pieces`) are a form
   (`_forms`) of what it was applied to (`_rules`, `_products`, `_local`, `_moves`); forms are
   contracted to Gramians, rows and weighted gradients, over processes too (`_ranks`).
"""

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
)
from torchjd_func.differentiate._layerwise._pieces import spread
from torchjd_func.differentiate._layerwise._plan import Layout, Plan, Settled, Step
from torchjd_func.differentiate._layerwise._planner import plan, run
from torchjd_func.differentiate._layerwise._ranks import Ranks, count, joined
from torchjd_func.differentiate._layerwise._record import (
    Batch,
    Call,
    Problem,
    Recorded,
    Returned,
)
from torchjd_func.differentiate._layerwise._spelled import Spelled

__all__ = [
    "Batch",
    "Call",
    "Layers",
    "Layout",
    "Plan",
    "Problem",
    "Ranks",
    "Recorded",
    "Returned",
    "Settled",
    "Spelled",
    "Step",
    "combine",
    "count",
    "cross_gramians",
    "gramians",
    "jacobian",
    "joined",
    "layers",
    "leaf_costs",
    "name_of",
    "plan",
    "rule_names",
    "run",
    "spread",
]
