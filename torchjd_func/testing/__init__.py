"""The contract of rules, for rules of your own: `check` tells in which way one breaks it."""

from torchjd_func.testing._case import Case as Case
from torchjd_func.testing._checks import CHECKS as CHECKS
from torchjd_func.testing._checks import Check as Check
from torchjd_func.testing._report import check

__all__ = ["check"]
