"""The small problems at the core: exact, batched over leading dimensions, in float64 inside."""

from torchjd_func.linalg._linear_program import linear_program
from torchjd_func.linalg._nnqp import Solution, dual_cone_projection, min_norm_point, nnqp
from torchjd_func.linalg._orthant import orthant_root
from torchjd_func.linalg._simplex import project_simplex

__all__ = [
    "Solution",
    "dual_cone_projection",
    "linear_program",
    "min_norm_point",
    "nnqp",
    "orthant_root",
    "project_simplex",
]
