"""Rules over several processes, in the groups of `torch.distributed`."""

from torchjd_func.distributed._across_workers import across_workers
from torchjd_func.distributed._data_parallel import data_parallel
from torchjd_func.distributed._gathered import gathered
from torchjd_func.distributed._handshake import check_same
from torchjd_func.distributed._mean import mean
from torchjd_func.distributed._sharded import sharded

__all__ = ["across_workers", "check_same", "data_parallel", "gathered", "mean", "sharded"]
