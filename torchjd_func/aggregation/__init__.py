"""Methods that turn a Jacobian into one update direction: one paper, one file."""

from torchjd_func.aggregation._aligned_mtl import aligned_mtl
from torchjd_func.aggregation._cagrad import cagrad
from torchjd_func.aggregation._config import config
from torchjd_func.aggregation._config_momentum import config_momentum
from torchjd_func.aggregation._dualproj import dualproj
from torchjd_func.aggregation._gradvac import gradvac
from torchjd_func.aggregation._imtl_g import imtl_g
from torchjd_func.aggregation._linear import constant, mean, sum
from torchjd_func.aggregation._mgda import mgda
from torchjd_func.aggregation._pcgrad import pcgrad
from torchjd_func.aggregation._upgrad import upgrad

__all__ = [
    "aligned_mtl",
    "cagrad",
    "config",
    "config_momentum",
    "constant",
    "dualproj",
    "gradvac",
    "imtl_g",
    "mean",
    "mgda",
    "pcgrad",
    "sum",
    "upgrad",
]
