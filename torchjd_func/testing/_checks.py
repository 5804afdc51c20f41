"""The parts of the contract, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torchjd_func import _check
from torchjd_func._types import Aggregator
from torchjd_func.testing import _claims, _contract, _transforms
from torchjd_func.testing._case import Case
from torchjd_func.testing._errors import Failure, explained


def _claimed(value: Any) -> bool:
    return value is not None and value is not False


class Check(NamedTuple):
    """One part of the contract; called with a `Case`, it raises AssertionError where it fails."""

    test: Callable[[Case], None]
    must: str
    remedy: str
    kind: type = object  # of the rules that it is about
    claim: str = ""  # the field of a case, or of a rule, without which it is not tested
    root: bool = False  # where it fails, others fail for the same reason

    def applies(self, case: Case) -> bool:
        """Say whether the check is about a rule."""
        rule = case.rule()
        claims = not self.claim or _claimed(
            getattr(case, self.claim, getattr(rule, self.claim, None))
        )
        return claims and isinstance(rule, self.kind)

    def __call__(self, case: Case) -> None:
        """Test a rule."""
        try:
            self.test(case)
        except Exception as error:
            got, remedy = explained(error), getattr(error, "remedy", None)
            remedy = self.remedy if remedy is None else remedy
            text = _check.message(f"`{case.name}`", self.must, got, remedy).strip()
            raise Failure(text, got) from error


CHECKS: dict[str, Check] = {
    "call": Check(
        _contract.called,
        "return a direction like one row of the Jacobian, or a 0-d loss, and the next state",
        "Return what a jd.Weighting, jd.Aggregator or jd.Scalarizer is to return.",
        root=True,
    ),
    "purity": Check(
        _contract.purity,
        "leave its arguments as they are",
        "Compute with new tensors, not in place.",
        root=True,
    ),
    "repeatable": Check(
        _contract.repeatable,
        "depend on its arguments alone",
        "Keep memory in the state, and draw with jd.random from a key in the state.",
        root=True,
    ),
    "state": Check(
        _contract.state_layout,
        "return a state of tensors, laid out like the one it is given",
        "Use a NamedTuple of tensors on the device of the argument, counters too.",
        root=True,
    ),
    "fresh state": Check(
        _contract.fresh_state,
        "start from what init returns, which depends on shapes alone",
        "Read shapes, dtype and device in init. If it takes a key, claim random=True, and take the "
        "key by jd.random.required(key, name), which says what to do where there is none.",
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
    "columns": Check(
        _contract.columns,
        "aggregate any columns by themselves, as it says by columnwise=True",
        "Leave columnwise=True out where a number depends on other columns, as by the length of a "
        "row: several processes would each see some columns.",
        Aggregator,
        "columnwise",
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
        "Guard roots and divisions by torch.where on both sides.",
    ),
    "non-finite rows": Check(
        _transforms.non_finite,
        "show a row that is not finite in its result, and nowhere else",
        "Let NaN through, without branches on it.",
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
