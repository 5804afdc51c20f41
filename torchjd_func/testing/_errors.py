"""What went wrong in a check, in words."""

from __future__ import annotations

import pathlib
import traceback

import torch

import torchjd_func
from torchjd_func import _check

_ELSEWHERE = tuple(str(pathlib.Path(str(x.__file__)).parent) for x in (torch, torchjd_func))


class Fault(AssertionError):
    """What came instead, with what to do about it, if that is known better than in general."""

    def __init__(self, got: str, remedy: str | None = None) -> None:
        """Keep the remedy; an empty one says that there is nothing to add."""
        super().__init__(got)
        self.remedy = remedy


class Failure(AssertionError):
    """A check that failed: its whole message, and what came instead."""

    def __init__(self, text: str, got: str) -> None:
        """Keep both."""
        super().__init__(text)
        self.got = got


def explained(error: Exception) -> str:
    """Return what an error says: all of it if it says what to do, else where it came from."""
    text = str(error).strip()
    if isinstance(error, AssertionError):
        return text.rstrip(".")
    if _check.in_style(text):
        return f"{type(error).__name__}: {text.rstrip('.')}"
    first = (text.splitlines() or [""])[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}{_place(error)}"


def _place(error: Exception) -> str:
    """Return the last line of the user's own that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_ELSEWHERE)]
    if not own or own[-1].name == "<module>":
        return ""
    return f" (line {own[-1].lineno} of {pathlib.Path(own[-1].filename).name}, {own[-1].name})"
