"""Methods that move a set of models at once, to cover the Pareto front."""

from torchjd_func.sets._hypervolume_gradient import hypervolume_gradient
from torchjd_func.sets._moo_svgd import moo_svgd
from torchjd_func.sets._pareto_mtl import pareto_mtl
from torchjd_func.sets._stch_set import stch_set
from torchjd_func.sets._types import SetRule

__all__ = ["SetRule", "hypervolume_gradient", "moo_svgd", "pareto_mtl", "stch_set"]
