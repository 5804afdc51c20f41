"""What a rule claims beyond the contract, and what it does where objectives are absent."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _tree
from torchjd_func.testing._case import Case
from torchjd_func.testing._compare import assert_trees_close, require
from torchjd_func.testing._matrices import KINDS, conflict, span_gap


def permutation(case: Case) -> None:
    """The order of the objectives does not matter."""
    if case.random:  # in distribution alone
        return
    x, losses = case.sample(), case.losses(case.size)
    order = torch.arange(len(x), device=x.device).roll(1)
    rule, state = case.start(x)
    want, _ = case.step(rule, x, state)
    got, _ = case.step(rule, x[order], state, None if losses is None else losses[order])
    want = (want[0], want[1][order]) if case.scalar else want
    assert_trees_close(got, want, 1e-6, 1e-7 * float(x.norm()), "results of another order")


def scale(case: Case) -> None:
    """Gradients, or losses, that are s times as long give a result that is s^degree times it."""
    assert case.degree is not None
    x = case.sample()
    rule, state = case.start(x)
    want = _main(case, case.step(rule, x, state)[0])
    for factor in (1e-6, 3.0, 1e6):
        got = _main(case, case.step(rule, factor * x, state)[0]) * factor**-case.degree
        what = f"results at the scale {factor:g}, divided by {factor:g}^{case.degree:.3g},"
        atol = 1e-8 * float(x.norm()) ** case.degree
        assert_trees_close(got, want, 1e-5, atol, what, _degree_remedy(case, rule, x, state))


def _degree_remedy(case: Case, rule: Any, x: Tensor, state: Any) -> str | None:
    """Name the degree that fits, if there is one among halves."""
    sizes = [float(_main(case, case.step(rule, s * x, state)[0]).norm()) for s in (1e-6, 1.0, 1e6)]
    if min(sizes) <= 0 or not math.isfinite(max(sizes)):
        return None
    below, above = (math.log10(b / a) / 6 for a, b in itertools.pairwise(sizes))
    degree = round(2 * above) / 2
    if max(abs(below - degree), abs(above - degree)) > 1e-6:
        return None
    return f"The degree {degree:g} fits: claim degree={degree:g}."


def _main(case: Case, result: Any) -> Tensor:
    return result[0] if case.scalar else result


def non_conflicting(case: Case) -> None:
    """The direction has no negative product with a gradient."""
    for jac, direction in _directions(case):
        lowest = float(conflict(jac, direction))
        require(lowest >= -1e-6, f"the cosine {lowest:.2g} with a gradient of {jac}")


def weighted(case: Case) -> None:
    """The direction is a combination of the gradients."""
    for jac, direction in _directions(case):
        if float(direction.norm()) > 1e-7 * float(jac.norm()):
            gap = span_gap(jac, direction)
            require(gap < 1e-6, f"a direction that leaves the span of the rows by {gap:.2g}")


def linear_under_scaling(case: Case) -> None:
    """The direction is additive in the scales of the gradients."""
    x = case.sample()
    rule, state = case.start(x)
    ramp = torch.linspace(1.0, 3.0, len(x)).to(x)[:, None]
    scales = (ramp, ramp.flip(0).square(), ramp + ramp.flip(0).square())
    first, second, both = (case.step(rule, factor * x, state)[0] for factor in scales)
    size = float(both.norm())
    assert_trees_close(first + second, both, 1e-6, 1e-6 * size, "sums of scaled directions")


def _directions(case: Case) -> Any:
    """Yield matrices of all kinds with their directions."""
    for kind in KINDS:
        jac = case.sample(kind=kind)
        rule, state = case.start(jac)
        yield jac, case.step(rule, jac, state)[0]


def absent_rows(case: Case) -> None:
    """What is absent counts as if it were not there, whatever stands in its place."""
    m = max(5, case.min_m + 2) if case.m is None else case.m
    x, losses = case.sample(m), case.losses(m)
    away = torch.isin(torch.arange(m), torch.tensor([1, 3] if m > 4 else [1])).to(x.device)
    rule, state = case.start(x, m)
    dirty = torch.where(_tree.per_row(away, x), torch.nan, x)
    known = None if losses is None else torch.where(away, torch.nan, losses)
    # A loss that is absent comes as 1: the others are around it, below it, and above it.
    for factor in (1, 0.25, 4) if case.scalar else (1,):
        _as_if_alone(case, rule, state, factor * x, factor * dirty, known, ~away)
    _independent_of_the_absent(case, rule, state, dirty, known, ~away)
    _none_present(case, rule, case.after(rule, x, state, 2), dirty, known)
    _mapped(case, rule, state, x, losses, away)
    if not case.random:
        everything = torch.ones_like(away)
        got = case.step(rule, x, state, losses, everything)
        what = "results with `present` all true and without it"
        assert_trees_close(got[0], case.step(rule, x, state, losses)[0], what=what)


def _as_if_alone(
    case: Case, rule: Any, state: Any, x: Tensor, dirty: Tensor, losses: Any, present: Tensor
) -> None:
    """Compare three steps with those of the rule on the present rows alone."""
    if case.random or (case.m is not None and case.subset is None):
        return
    rows = present.nonzero()[:, 0].tolist()
    part = case.among(rows)
    small = case.init(part, x[rows])
    known = None if losses is None else losses[rows]
    for flipped in (False, True, False):
        seen = (dirty.flip(-1), x.flip(-1)) if flipped and not case.scalar else (dirty, x)
        got, state = case.step(rule, seen[0], state, losses, present)
        want, small = case.step(part, seen[1][rows], small, known)
        if case.scalar:
            want = (want[0], torch.zeros_like(x).index_put((present,), want[1]))
        what = "results with absent rows and on the present rows alone"
        assert_trees_close(got, want, 1e-7, 1e-9, what)


def _independent_of_the_absent(
    case: Case, rule: Any, state: Any, dirty: Tensor, losses: Any, present: Tensor
) -> None:
    other = torch.where(_tree.per_row(present, dirty), dirty, 1e9)
    known = None if losses is None else torch.where(present, losses, 1e9)
    got, later = case.step(rule, dirty, state, losses, present)
    want, again = case.step(rule, other, state, known, present)
    assert_trees_close(got, want, what="results of other numbers in absent rows")
    assert_trees_close(later, again, what="states of other numbers in absent rows")
    finite = all(bool(leaf.isfinite().all()) for leaf in _tree.leaves(got))
    require(finite, f"{got} where an absent row is not a number")


def _none_present(case: Case, rule: Any, state: Any, dirty: Tensor, losses: Any) -> None:
    nobody = torch.zeros(len(dirty), dtype=torch.bool, device=dirty.device)
    got, later = case.step(rule, dirty, state, losses, nobody)
    zeros = _tree.map(torch.zeros_like, got)
    assert_trees_close(got, zeros, rtol=0, atol=0, what="results where nothing is present")
    assert_trees_close(later, state, rtol=0, atol=0, what="states where nothing is present")


def _mapped(case: Case, rule: Any, state: Any, x: Tensor, losses: Any, away: Tensor) -> None:
    """Compare a batch of masks with a loop."""
    masks = torch.stack([~away, torch.ones_like(away), torch.zeros_like(away)])

    def call(present: Tensor) -> Any:
        return case.step(rule, x, state, losses, present)

    loop = _tree.stack([call(mask) for mask in masks])
    assert_trees_close(vmap(call)(masks), loop, 1e-7, 1e-9, "a batch of masks and a loop")
