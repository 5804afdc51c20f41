"""Rules over several processes, in the groups of `torch.distributed`."""

from torchjd_func.distributed._across_workers import across_workers
from torchjd_func.distributed._data_parallel import data_parallel
from torchjd_func.distributed._handshake import check_same
from torchjd_func.distributed._mean import mean

__all__ = ["across_workers", "check_same", "data_parallel", "mean"]
