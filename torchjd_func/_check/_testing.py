"""What `jd.testing.check` is given: a rule or a factory, and claims."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torchjd_func._check._messages import fail
from torchjd_func._check._methods import rule
from torchjd_func._check._options import choice


def claims(given: Iterable[str], known: Iterable[str]) -> None:
    """Check that all claims are known."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"Did you mean {near[0]}?" if near else "Leave it out."
            rule = f"be among {', '.join(known)}"
            fail(TypeError, "the claims of jd.testing.check", rule, repr(name), remedy)


def claim_value(name: str, value: Any, default: Any) -> None:
    """Check the value of a claim."""
    if isinstance(default, bool) and not isinstance(value, bool):
        remedy = "Claim it, or leave it out."
        fail(TypeError, f"`{name}`", "be True or False", repr(value), remedy)
    if name == "observes":
        choice(name, value, ("", "losses", "nothing"))
    if name == "degree" and value is not None and type(value) not in (int, float):
        fail(TypeError, "`degree`", "be a number", repr(value), "Pass 1.0, or None to claim none.")


def claim_of(name: str, value: Any, kind: type) -> None:
    """Check that a claim is about rules of this kind."""
    if not isinstance(value, kind):
        rule_ = f"be claimed of a jd.{kind.__name__}"
        fail(ValueError, f"`{name}`", rule_, repr(value), "Leave it out: it is not tested of this.")


def factory(value: Any, kinds: tuple[type, ...]) -> None:
    """Check that a function makes a rule of the number of objectives, and of nothing else."""
    if not callable(value):
        rule(value, kinds)
    if (needed := _parameters(value)) != ["m"]:
        name = getattr(value, "__name__", repr(value))
        rule_ = "be a rule, or a function of `m` alone that makes one for m objectives"
        got = f"`{name}`, a function of {', '.join(needed) or 'options alone'}"
        call = f"{name}({'...' if needed else ''})"
        remedy = f"Call the factory, jd.testing.check({call}), or pass lambda m: {call}."
        fail(TypeError, "`rule`", rule_, got, remedy)


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters without a default."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some functions of C have no signature
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind < p.KEYWORD_ONLY]
