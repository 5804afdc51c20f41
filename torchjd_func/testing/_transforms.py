"""What every rule promises under torch.func, torch.compile, and the routes of `jd.grad`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from torchjd_func import _tree, random
from torchjd_func._types import Aggregator, State
from torchjd_func.differentiate import grad, instancewise
from torchjd_func.testing._case import Case
from torchjd_func.testing._compare import assert_trees_close, compiled, require


def compiles(case: Case) -> None:
    """Three steps of training are one graph, and give what they give eager."""
    rule, state = case.start(case.sample())
    jac, offset = case.objective()
    step = case.training_step(rule)
    fast, counter = compiled(step)
    eager = got = (torch.zeros_like(jac[0]), offset, state)
    for _ in range(3):
        eager, got = step(eager[2], eager[0]), fast(got[2], got[0])
        assert_trees_close(got, eager, what="compiled and eager steps")
    require(counter.graphs == 1, f"{counter.graphs} graphs for three steps")


def maps(case: Case) -> None:
    """A batch of problems, each with its state and its key, equals a loop."""
    kinds = ("gaussian", "scaled", "zero")
    batch = torch.stack([case.sample(kind=kind, seed=5) for kind in kinds])
    batch = batch * batch.new_tensor([1.0, 0.5, 2.0]).reshape(-1, *[1] * (batch.ndim - 1))
    keys = random.split(random.key(0, device=case.device), len(kinds)) if case.random else None
    rule = case.rule()

    def two_steps(x: Tensor, key: Tensor | None) -> tuple[Any, Any, State]:
        state = rule.init(x, key=key)
        first, state = case.step(rule, x, state)
        state = case.observe(rule, x, state)
        second, state = case.step(rule, x.flip(-1), state)
        return first, second, state

    got = vmap(two_steps, in_dims=(0, None if keys is None else 0))(batch, keys)
    loop = [two_steps(x, None if keys is None else keys[i]) for i, x in enumerate(batch)]
    assert_trees_close(got, _tree.stack(loop), rtol=1e-7, atol=1e-9, what="a batch and a loop")


def routes(case: Case) -> None:
    """`jd.grad` gives on every route what the rule gives on the Jacobian, and so do weights."""
    rule, state = case.start(case.sample())
    jac, offset = case.objective()
    weigh = getattr(rule, "weighting", None)
    for route in ("jacobian", "product") if weigh is None or case.scalar else _ROUTES:
        _same_on_route(case, rule, state, route)
    if isinstance(rule, Aggregator) and rule.weighting is not None:
        weights, _ = rule.weighting(jac @ jac.mT, state, losses=offset)
        first, _ = rule(jac, state, losses=offset)
        assert_trees_close(jac.mT @ weights, first, what="weighted rows and directions")


_ROUTES = ("jacobian", "product", "layerwise")


def _same_on_route(case: Case, rule: Any, start: State, route: Any) -> None:
    jac, offset = case.objective()
    objective = instancewise(lambda x, rows, offset: rows @ x + offset)
    step = grad(objective, rule, route=route)
    got_state = want_state = start
    for _ in range(3):
        got, got_state = step(got_state, torch.zeros_like(jac[0]), jac, offset)
        if case.scalar:
            (_, weights), want_state = case.step(rule, offset, want_state)
            want = jac.mT @ weights
        else:
            want, want_state = rule(jac, want_state, losses=offset)
        assert_trees_close(got, want, what=f"directions by the route {route!r} and by the Jacobian")
        assert_trees_close(got_state, want_state, what=f"states by the route {route!r}")


def derivative(case: Case) -> None:
    """Derivatives by torch.func are finite, and agree with differences where claimed."""
    x = case.sample(seed=11)
    rule, state = case.start(x)

    def value(x: Tensor) -> Tensor:
        out, _ = case.step(rule, x, state)
        return out[0] if case.scalar else (out * torch.linspace(1, 2, len(out)).to(out)).sum()

    got = torch.func.grad(value)(x)
    require(bool(got.isfinite().all()), f"the derivative {got}")
    along = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    slope, size = (got * along).sum(), float(got.norm() * along.norm())
    pushed = jvp(value, (x,), (along,))[1]
    tolerance = 1e-9 * size + 1e-12
    assert_trees_close(pushed, slope, 1e-6, tolerance, "forward and reverse derivatives")
    if case.differentiable:
        h = 1e-6
        difference = (value(x + h * along) - value(x - h * along)) / (2 * h)
        what = "derivatives and differences"
        assert_trees_close(slope, difference, 1e-4, 1e-6 + 1e-5 * size, what, _CONSTANT)


_CONSTANT = (
    "Some part is held constant: by detach, .item(), torch.no_grad or rounding. Leave it out; or, "
    "if it is meant, as where weights are detached and losses are not, claim differentiable=False."
)


def non_finite(case: Case) -> None:
    """A gradient that is not finite raises nothing, is seen, and harms no other problem."""
    x = case.sample()
    rule, state = case.start(x)
    finite = {}
    # Some means of losses have a limit where one is infinite.
    for bad in (torch.nan,) if case.scalar else (torch.nan, torch.inf):
        batch = torch.stack([x, torch.cat([x[:1] * bad, x[1:]])])
        got = vmap(lambda x: case.step(rule, x, state)[0])(batch)
        alone, _ = case.step(rule, batch[1], state)
        want, _ = case.step(rule, x, state)
        fine = _tree.map(lambda leaf: leaf[0], got)
        assert_trees_close(fine, want, 1e-7, 1e-9, "results beside one that is not finite")
        finite[bad] = all(bool(leaf.isfinite().all()) for leaf in _tree.leaves(alone))
    shown = {True: "a finite result", False: "not-a-numbers"}
    listed = " and ".join(f"{shown[seen]} for a row of {bad}" for bad, seen in finite.items())
    good = set(finite.values()) == {case.drops_non_finite}
    require(good, listed, _non_finite_remedy(case.drops_non_finite, list(finite.values())))


def _non_finite_remedy(claimed: bool, finite: list[bool]) -> str:
    """Say what to do about rows that are not finite."""
    drop = (
        "take out rows that are not finite before they are used, "
        "torch.where(rows.isfinite().all(1, keepdim=True), rows, 0), and count the others alone"
    )
    if claimed:
        return f"It claims drops_non_finite=True: {drop}; or leave the claim out, and show them."
    if any(finite) and not all(finite):
        cause = (
            "NaN is left out, and inf is not" if finite[0] else "inf is outvoted, and NaN is not"
        )
        return (
            f"As by a median, {cause}: add 0 * rows.sum(0), which is NaN for both. Or {drop}, and "
            "claim drops_non_finite=True."
        )
    return "Let NaN through, without nan_to_num or branches on it; or claim drops_non_finite=True."
