"""Differentiate a vector of losses: Jacobians, Gramians, and update directions.

The way of a call, e.g. of what `grad_and_value` returns:

1. `_verb.linearize` strips plain autograd, takes `present` and `size` out of the keyword arguments,
   and asks the objective to linearize itself with a `Request`;
2. an objective (`_objective.Plain`, `_instancewise`, `_multitask`, `_accumulate`, `_scaled`,
   `_sharded`) runs once, through `torch.func.vjp` or layer by layer (`_layered`), and returns a
   `Linearized`: losses, which of them there are, and the Jacobian as a linear map;
3. `_routes` contracts that to Gramians of groups of leaves, with the pullback that goes with them;
4. the rule weighs, the pullback is applied, and values come out.

To add a kind of objective, write the methods of `_objective.Objective`; combinators ask for these
and for nothing else.
"""

from torchjd_func.differentiate._accumulate import accumulate
from torchjd_func.differentiate._cast import cast_floating
from torchjd_func.differentiate._double_sampling import double_sampling
from torchjd_func.differentiate._explain import check_instancewise, explain_gramian
from torchjd_func.differentiate._grad import grad, grad_and_value
from torchjd_func.differentiate._gramian import (
    cross_gramian,
    gramian,
    gramian_and_value,
    gramian_vjp,
)
from torchjd_func.differentiate._init_state import init_state
from torchjd_func.differentiate._instancewise import instancewise, per_example
from torchjd_func.differentiate._jacobian import jac, jac_and_value
from torchjd_func.differentiate._multitask import multitask
from torchjd_func.differentiate._row_norms import row_norms
from torchjd_func.differentiate._where import features

__all__ = [
    "accumulate",
    "cast_floating",
    "check_instancewise",
    "cross_gramian",
    "double_sampling",
    "explain_gramian",
    "features",
    "grad",
    "grad_and_value",
    "gramian",
    "gramian_and_value",
    "gramian_vjp",
    "init_state",
    "instancewise",
    "jac",
    "jac_and_value",
    "multitask",
    "per_example",
    "row_norms",
]
