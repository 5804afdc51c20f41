"""Differentiate a vector of losses: Jacobians, Gramians, and update directions."""

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
