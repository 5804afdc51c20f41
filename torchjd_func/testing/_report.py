"""The function that tests a rule, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torchjd_func import _check
from torchjd_func._types import Aggregator, Scalarizer, Weighting
from torchjd_func.testing._case import Case
from torchjd_func.testing._checks import CHECKS
from torchjd_func.testing._errors import Failure

_KINDS = (Weighting, Aggregator, Scalarizer)
_DEFAULTS = {field.name: field.default for field in fields(Case) if field.name != "make"}


def check(
    rule: Weighting | Aggregator | Scalarizer | Callable[[int], Any],
    **claims: Any,
) -> None:
    """Test that a rule keeps the contract of rules, on small seeded problems.

    The rule has to be pure; to keep structure, shapes and dtypes of its state; to give the same on
    a pytree as on a matrix, under `torch.func.vmap` as in a loop, compiled as one graph as eager,
    and on every route of `jd.grad`; to have finite derivatives; and to leave out absent objectives.
    Takes a few seconds. `CHECKS` holds the parts, by name: `CHECKS["vmap"](Case(make))` is one.

    Args:
        rule: The rule, or a factory `m -> rule` for one that is made for `m` objectives.
        **claims: What the rule claims, or does not: the fields of `Case`, by name; the table is
            in "Write your own method" of the manual.

    Raises:
        AssertionError: If the rule fails a check, or a claim is not true. Where one failure is the
            cause of others, these are named after it.
        TypeError: If a factory was not called, or a claim is unknown.
        ValueError: If a claim is not about rules of this type.

    Example:
        >>> import torch, torchjd_func as jd
        >>> def agreement(gramian):
        ...     share = (gramian >= 0).double().mean(1)
        ...     return share / share.sum()
        >>> rule = jd.weighted(jd.stateless("agreement", agreement))
        >>> jd.testing.check(rule, present=False, equivariant=True, degree=1, weighted=True)
    """
    case = _case(rule, claims)
    names = [name for name, part in CHECKS.items() if part.applies(case)]
    failures = _failures(case, ["call"])
    if failures:  # all others fail for it
        raise AssertionError(
            "\n".join(["1 check failed, and the others need it:", *_report(failures)])
        )
    failures = _failures(case, [name for name in names if name != "call"])
    if failures:
        title = f"{len(failures)} of {len(names)} checks failed:"
        raise AssertionError("\n".join([title, *_report(failures)]))


def _case(rule: Any, claims: dict[str, Any]) -> Case:
    """Return the case of a rule, or of a factory, after a check of the claims."""
    _check.claims(claims, _DEFAULTS)
    for name, value in claims.items():
        _check.claim_value(name, value, _DEFAULTS[name])
    if not isinstance(rule, _KINDS):
        _check.factory(rule, _KINDS)
    case = Case(_always(rule) if isinstance(rule, _KINDS) else rule, **claims)
    _check.rule(case.rule(), (Aggregator, Scalarizer))
    for part in CHECKS.values():
        if claims.get(part.claim):
            _check.claim_of(part.claim, case.rule(), part.kind)
    return case


def _always(rule: Any) -> Callable[[int], Any]:
    return lambda m: rule


def _failures(case: Case, names: list[str]) -> dict[str, Failure]:
    """Return how checks fail, by name."""
    failures = {}
    for name in names:
        try:
            CHECKS[name](case)
        except Failure as failure:
            failures[name] = failure
    return failures


def _report(failures: dict[str, Failure]) -> list[str]:
    """Return a line for each cause, and names what else fails for it."""
    root = next((name for name in failures if CHECKS[name].root), None)
    if root is not None:
        others = [name for name in failures if name != root]
        return [_line(root, failures), *_also("Likely to follow from it", others)]
    lines: list[str] = []
    for got in dict.fromkeys(failure.got for failure in failures.values()):
        first, *others = [name for name, failure in failures.items() if failure.got == got]
        lines += [_line(first, failures), *_also("The same in", others)]
    return lines


def _line(name: str, failures: dict[str, Failure]) -> str:
    return f"- {name}: {failures[name]}"


def _also(what: str, names: list[str]) -> list[str]:
    return [f"  {what}: {', '.join(names)}."] if names else []
