"""The parts of the contract, by name, and the function that tests them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torchjd_func import _check
from torchjd_func._types import Aggregator, Scalarizer, Weighting
from torchjd_func.testing import _claims, _contract, _transforms
from torchjd_func.testing._case import Case


def _claimed(value: Any) -> bool:
    return value is not None and value is not False


class Check(NamedTuple):
    """One part of the contract; called with a `Case`, it raises AssertionError where it fails."""

    test: Callable[[Case], None]
    must: str
    remedy: str
    kind: type = object  # of the rules that it is about
    claim: str = ""  # the field of a case without which it is not tested

    def applies(self, case: Case) -> bool:
        """Say whether the check is about a rule."""
        claims = not self.claim or _claimed(getattr(case, self.claim))
        return claims and isinstance(case.rule(), self.kind)

    def __call__(self, case: Case) -> None:
        """Test a rule."""
        try:
            self.test(case)
        except Exception as error:
            text = (str(error) if isinstance(error, AssertionError) else _short(error)).rstrip(".")
            message = _check.message(f"`{case.name}`", self.must, text, self.remedy)
            raise AssertionError(message) from error


def _short(error: Exception) -> str:
    """Return the first sentence of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0].partition('. ')[0]}"


CHECKS: dict[str, Check] = {
    "call": Check(
        _contract.called,
        "return a direction like one row of the Jacobian, or a 0-d loss, and the next state",
        "Claim what it needs: random=True, needs_losses=True, min_m=, or m=.",
    ),
    "purity": Check(
        _contract.purity,
        "leave its arguments as they are",
        "Compute with new tensors, not in place.",
    ),
    "repeatable": Check(
        _contract.repeatable,
        "depend on its arguments alone",
        "Keep memory in the state, and draw with jd.random from a key in the state.",
    ),
    "state": Check(
        _contract.state_layout,
        "return a state of tensors, laid out like the one it is given",
        "Use a NamedTuple of tensors on the device of the argument, counters too.",
    ),
    "fresh state": Check(
        _contract.fresh_state,
        "start from what init returns, which depends on shapes alone",
        "Read shapes, dtype and device in init; claim random=True if it takes a key.",
    ),
    "state size": Check(
        _contract.state_size,
        "refuse a state of another size or of another rule",
        "Compare type and shapes of the state, and raise a ValueError.",
    ),
    "dtypes": Check(
        _contract.dtypes,
        "keep float64, float32 and bfloat16, and compute in float32 or better",
        "Make tensors like the argument, and convert what is returned to its dtype.",
    ),
    "pytree": Check(
        _contract.pytree,
        "count a pytree as its numbers in leaf order",
        "Use all leaves; write it as a jd.Weighting if the Gramian is enough.",
    ),
    "losses": Check(
        _contract.losses,
        "work without losses, or say that it needs them",
        "Claim needs_losses=True, and raise a ValueError that names them where they are None.",
        Aggregator,
    ),
    "zero": Check(
        _contract.zero,
        "return zero for gradients of zero",
        "Guard divisions: torch.where before and after them.",
        Aggregator,
    ),
    "one objective": Check(
        _contract.single,
        "descend one objective along its gradient",
        "Claim keeps_direction=False, or min_m and an error that names the objectives.",
    ),
    "repr": Check(
        _contract.shown,
        "be shown in one line, as type and name",
        "Make it by jd.Weighting, jd.Aggregator or jd.Scalarizer, with a plain name.",
    ),
    "compile": Check(
        _transforms.compiles,
        "be captured by torch.compile(fullgraph=True), once for three steps",
        "Use no `if` on a tensor, and no numpy; keep counters as tensors in the state.",
    ),
    "vmap": Check(
        _transforms.maps,
        "give under torch.func.vmap what a loop gives",
        "Use torch.where for `if`, read no value, and write nothing in place.",
    ),
    "routes": Check(
        _transforms.routes,
        "give the same by jd.grad on every route as on the Jacobian",
        "Let weights depend on the Gramian, and the losses, alone.",
    ),
    "derivative": Check(
        _transforms.derivative,
        "have finite derivatives that agree with differences",
        "Guard roots and divisions by torch.where on both sides; or claim differentiable=False.",
    ),
    "non-finite rows": Check(
        _transforms.non_finite,
        "show a row that is not finite in its result, and nowhere else",
        "Let NaN through, without branches on it; or claim drops_non_finite=True.",
    ),
    "absent rows": Check(
        _claims.absent_rows,
        "leave out what is absent, as if it were not there",
        "Take `present=None`, (m,) bool, and count with it; or claim present=False.",
        claim="present",
    ),
    "permutation": Check(
        _claims.permutation,
        "not depend on the order of the objectives",
        "Claim equivariant=False if it does.",
        claim="equivariant",
    ),
    "scale": Check(
        _claims.scale,
        "be homogeneous of the claimed degree",
        "Claim degree=None if it is not; an absolute tolerance or eps is the usual cause.",
        claim="degree",
    ),
    "non-conflicting": Check(
        _claims.non_conflicting,
        "not conflict with any gradient",
        "Claim non_conflicting=False if it may.",
        Aggregator,
        "non_conflicting",
    ),
    "linear under scaling": Check(
        _claims.linear_under_scaling,
        "be linear in the scales of the gradients",
        "Claim linear_under_scaling=False if it is not.",
        Aggregator,
        "linear_under_scaling",
    ),
    "weighted": Check(
        _claims.weighted,
        "be a combination of the gradients",
        "Claim weighted=False if it is not.",
        Aggregator,
        "weighted",
    ),
}


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
        **claims: What the rule claims, or does not: the fields of `Case`, by name.

    Raises:
        AssertionError: If the rule fails a check, or a claim is not true; names all of them.

    Example:
        >>> import torch, torchjd_func as jd
        >>> def agreement(gramian):
        ...     share = (gramian >= 0).double().mean(1)
        ...     return share / share.sum()
        >>> rule = jd.weighted(jd.stateless("agreement", agreement))
        >>> jd.testing.check(rule, present=False, equivariant=True, degree=1, weighted=True)
    """
    made = isinstance(rule, Weighting | Aggregator | Scalarizer)
    case = Case(_always(rule) if made else rule, **claims)
    _check.rule(case.rule(), (Aggregator, Scalarizer))
    names = [name for name, part in CHECKS.items() if part.applies(case)]
    first = _failure("call", case)  # without it, all others fail for the same reason
    others = [] if first else [_failure(name, case) for name in names if name != "call"]
    failures = [text for text in (first, *others) if text]
    if failures:
        listed = "\n".join(f"- {text}" for text in failures)
        raise AssertionError(f"{len(failures)} of {len(names)} checks failed:\n{listed}")


def _always(rule: Any) -> Callable[[int], Any]:
    return lambda m: rule


def _failure(name: str, case: Case) -> str | None:
    """Return how a check fails."""
    try:
        CHECKS[name](case)
    except AssertionError as error:
        return f"{name}: {error}"
    return None
