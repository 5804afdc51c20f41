"""Functional, JAX-style training with several losses, on torch.func."""

from torchjd_func import interop, linalg, random, scalarizers
from torchjd_func._functionalize import functionalize
from torchjd_func._types import (
    Aggregator,
    Observation,
    Scalarizer,
    Weighting,
    stateless,
    weighted,
)
from torchjd_func.aggregation import constant, dualproj, mean, mgda, sum, upgrad
from torchjd_func.differentiate import (
    cross_gramian,
    grad,
    grad_and_value,
    gramian,
    gramian_and_value,
    gramian_vjp,
    init_state,
    instancewise,
    jac,
    jac_and_value,
    multitask,
    per_example,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Observation",
    "Scalarizer",
    "Weighting",
    "constant",
    "cross_gramian",
    "dualproj",
    "functionalize",
    "grad",
    "grad_and_value",
    "gramian",
    "gramian_and_value",
    "gramian_vjp",
    "init_state",
    "instancewise",
    "interop",
    "jac",
    "jac_and_value",
    "linalg",
    "mean",
    "mgda",
    "multitask",
    "per_example",
    "random",
    "scalarizers",
    "stateless",
    "sum",
    "upgrad",
    "weighted",
]
