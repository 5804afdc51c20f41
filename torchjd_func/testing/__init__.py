"""The contract of rules, for rules of your own: `check` tells in which way one breaks it."""

from torchjd_func.testing._case import Case
from torchjd_func.testing._checks import CHECKS, Check, check

__all__ = ["CHECKS", "Case", "Check", "check"]
