"""The border to the impure world; names that change their arguments end in an underscore."""

from torchjd_func.interop._backward import backward_
from torchjd_func.interop._checkpoints import load_state_dict, state_dict
from torchjd_func.interop._optimizers import assign_grads_
from torchjd_func.interop._torchjd import torchjd_aggregator

__all__ = ["assign_grads_", "backward_", "load_state_dict", "state_dict", "torchjd_aggregator"]
