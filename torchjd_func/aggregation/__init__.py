"""Methods that turn a Jacobian into one update direction: one paper, one file."""

from torchjd_func.aggregation._dualproj import dualproj
from torchjd_func.aggregation._linear import constant, mean, sum
from torchjd_func.aggregation._mgda import mgda
from torchjd_func.aggregation._upgrad import upgrad

__all__ = ["constant", "dualproj", "mean", "mgda", "sum", "upgrad"]
