"""Rules made of rules: type in = type out."""

from torchjd_func.combinators._every import every
from torchjd_func.combinators._grouped import grouped
from torchjd_func.combinators._log_losses import log_losses
from torchjd_func.combinators._monitored import monitored
from torchjd_func.combinators._smoothed import smoothed

__all__ = ["every", "grouped", "log_losses", "monitored", "smoothed"]
