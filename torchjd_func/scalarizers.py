"""Methods that turn the losses into one loss, which is then differentiated once.

A scalarizer costs one backward pass, whatever the number of losses, and is used like an aggregator:
`jd.grad(objective, jd.scalarizers.stch())`. What sets it apart is the derivative of its loss by
each of the losses: these are the weights of the gradients. Some want more than that call, and
stay as they began without it: `uw` and `imtl_l` are trained with the parameters, `dwa` and `famo`
learn by `observe`.
"""

from torchjd_func.scalarization._cosmos import cosmos
from torchjd_func.scalarization._dwa import dwa
from torchjd_func.scalarization._famo import famo
from torchjd_func.scalarization._geometric import geometric_mean, log_sum
from torchjd_func.scalarization._hypervolume import hypervolume
from torchjd_func.scalarization._linear import constant, mean, sum
from torchjd_func.scalarization._norm import p_norm, power_mean
from torchjd_func.scalarization._pbi import pbi
from torchjd_func.scalarization._random import random
from torchjd_func.scalarization._softmax import softmax
from torchjd_func.scalarization._stch import stch
from torchjd_func.scalarization._tchebycheff import augmented_tchebycheff, tchebycheff
from torchjd_func.scalarization._uncertainty import imtl_l, uw
from torchjd_func.scalarization._worst_case import cvar, group_dro

__all__ = [
    "augmented_tchebycheff",
    "constant",
    "cosmos",
    "cvar",
    "dwa",
    "famo",
    "geometric_mean",
    "group_dro",
    "hypervolume",
    "imtl_l",
    "log_sum",
    "mean",
    "p_norm",
    "pbi",
    "power_mean",
    "random",
    "softmax",
    "stch",
    "sum",
    "tchebycheff",
    "uw",
]
