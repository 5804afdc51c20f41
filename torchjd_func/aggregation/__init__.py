"""Methods that turn a Jacobian into one update direction: one paper, one file."""

from torchjd_func.aggregation._db_mtl import db_mtl
from torchjd_func.aggregation._dualproj import dualproj
from torchjd_func.aggregation._excess_mtl import excess_mtl
from torchjd_func.aggregation._graddrop import graddrop
from torchjd_func.aggregation._gradnorm import gradnorm
from torchjd_func.aggregation._krum import krum
from torchjd_func.aggregation._linear import constant, mean, sum
from torchjd_func.aggregation._mgda import mgda
from torchjd_func.aggregation._moco import moco
from torchjd_func.aggregation._rlw import rlw
from torchjd_func.aggregation._trimmed_mean import trimmed_mean
from torchjd_func.aggregation._upgrad import upgrad

__all__ = [
    "constant",
    "db_mtl",
    "dualproj",
    "excess_mtl",
    "graddrop",
    "gradnorm",
    "krum",
    "mean",
    "mgda",
    "moco",
    "rlw",
    "sum",
    "trimmed_mean",
    "upgrad",
]
