"""Methods that turn a Jacobian into one update direction: one paper, one file."""

from torchjd_func.aggregation._aligned_mtl import aligned_mtl
from torchjd_func.aggregation._cagrad import cagrad
from torchjd_func.aggregation._clipped_mean import clipped_mean
from torchjd_func.aggregation._config import config
from torchjd_func.aggregation._config_momentum import config_momentum
from torchjd_func.aggregation._db_mtl import db_mtl
from torchjd_func.aggregation._dualproj import dualproj
from torchjd_func.aggregation._epo import epo
from torchjd_func.aggregation._excess_mtl import excess_mtl
from torchjd_func.aggregation._fairgrad import fairgrad
from torchjd_func.aggregation._ferero import ferero
from torchjd_func.aggregation._geometric_median import geometric_median
from torchjd_func.aggregation._graddrop import graddrop
from torchjd_func.aggregation._gradnorm import gradnorm
from torchjd_func.aggregation._gradvac import gradvac
from torchjd_func.aggregation._imtl_g import imtl_g
from torchjd_func.aggregation._krum import krum
from torchjd_func.aggregation._linear import constant, mean, sum
from torchjd_func.aggregation._mgda import mgda
from torchjd_func.aggregation._moco import moco
from torchjd_func.aggregation._modo import modo
from torchjd_func.aggregation._nash_mtl import nash_mtl
from torchjd_func.aggregation._pcd import pcd
from torchjd_func.aggregation._pcgrad import pcgrad
from torchjd_func.aggregation._pivrg import pivrg
from torchjd_func.aggregation._pmgda import pmgda
from torchjd_func.aggregation._rlw import rlw
from torchjd_func.aggregation._sam_gs import sam_gs
from torchjd_func.aggregation._sdmgrad import sdmgrad
from torchjd_func.aggregation._trimmed_mean import trimmed_mean
from torchjd_func.aggregation._upgrad import upgrad

__all__ = [
    "aligned_mtl",
    "cagrad",
    "clipped_mean",
    "config",
    "config_momentum",
    "constant",
    "db_mtl",
    "dualproj",
    "epo",
    "excess_mtl",
    "fairgrad",
    "ferero",
    "geometric_median",
    "graddrop",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "pivrg",
    "pmgda",
    "rlw",
    "sam_gs",
    "sdmgrad",
    "sum",
    "trimmed_mean",
    "upgrad",
]
