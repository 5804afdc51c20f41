"""What every rule promises, whatever it computes: purity, states, types."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate import init_state
from torchjd_func.testing._case import Case
from torchjd_func.testing._compare import (
    assert_same_layout,
    assert_trees_close,
    clone,
    require,
)
from torchjd_func.testing._errors import Fault, explained

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def called(case: Case) -> None:
    """The rule can be called, and returns a direction, or a loss, and a state."""
    try:
        _called(case, case.tree(case.sample()))
    except Fault:
        raise
    except Exception as error:
        raise Fault(explained(error), _call_remedy(case, explained(error))) from error


def _called(case: Case, x: Any) -> None:
    rule, state = case.start(x)
    got, _ = case.step(rule, x, state)
    want = (_tree.leaves(x)[0].sum(), x) if case.scalar else _tree.map(lambda leaf: leaf[0], x)
    assert_same_layout(got, want)
    case.observe(rule, x, state)
    if case.scalar:
        moved = any(bool((leaf != 0).any()) for leaf in _tree.leaves(got[1]))
        require(moved, "a loss whose derivative by the losses is 0", _DETACHED)


_DETACHED = (
    "Do not detach the losses, nor round them: jd.grad differentiates the loss. Weights may be "
    "detached, as in (weights.detach() * losses).sum()."
)
_SIGNATURES = (
    "An `update_fn` is called with (gramian, state, losses) in a jd.Weighting, with (jac, state, "
    "losses) in a jd.Aggregator, with (losses, state) in a jd.Scalarizer; an `init_fn` with the "
    "first of these and a key or None; an `observe` with (losses, state)."
)


def _call_remedy(case: Case, text: str) -> str:
    """Find by trial what a rule that cannot be called needs."""
    for claims in ({}, {"random": True}, _LOSSES, {"random": True} | _LOSSES):
        part = replace(case, **claims)
        said = ", ".join(f"{name}=True" for name in claims)
        if claims and _works(part):
            return f"Claim {said}."
        sizes = [m for m in range(1, 9) if m != case.m and _works(replace(part, m=m))]
        if sizes:
            size = f"m={sizes[0]}" if len(sizes) == 1 else f"min_m={sizes[0]}"
            return f"Claim {', '.join([said, size] if said else [size])}."
    if _works(case, case.sample()):
        return (
            "It takes a matrix, but not a pytree of (m, ...) tensors: apply it to each leaf by "
            "optree.tree_map(fn, jac)."
        )
    return _SIGNATURES if "positional" in text or "keyword" in text else ""


_LOSSES = {"needs_losses": True}


def _works(case: Case, x: Any = None) -> bool:
    """Say whether a rule can be called with these claims."""
    try:
        _called(case, case.tree(case.sample()) if x is None else x)
    except Exception:
        return False
    return True


def purity(case: Case) -> None:
    """Arguments and state are as before."""
    x = case.tree(case.sample())
    rule, state = case.start(x)
    state, losses = case.after(rule, x, state, 2), case.losses(case.size)
    seen = {"the first argument": x, "the state": state, "the losses": losses}
    before = clone(seen)
    _, later = case.step(rule, x, state, losses)
    case.observe(rule, x, later)
    for name, tree in seen.items():
        assert_trees_close(tree, before[name], rtol=0, atol=0, what=f"numbers in {name}")
    weigh, jac = getattr(rule, "weighting", None), case.objective()[0]
    if weigh is not None:
        gramian = jac @ jac.mT
        weigh(gramian, case.after(rule, jac, case.init(rule, jac)), losses=losses)
        assert_trees_close(gramian, jac @ jac.mT, rtol=0, atol=0, what="numbers in the Gramian")


def repeatable(case: Case) -> None:
    """The same call gives the same, and no global generator is used."""
    x = case.sample()
    rule, state = case.start(x)
    before = _generators()
    first, again = (case.step(rule, x, state) for _ in range(2))
    require(_same_generators(before), "a global generator that moved")
    assert_trees_close(again, first, rtol=0, atol=0, what="two results of the same call")


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), python_random.getstate(), np.random.get_state()


def _same_generators(before: tuple[Any, ...]) -> bool:
    seen, python, (_, words, *rest) = before
    _, now, *others = np.random.get_state()
    same = bool((words == now).all()) and rest == others
    return same and torch.equal(seen, torch.get_rng_state()) and python == python_random.getstate()


def state_layout(case: Case) -> None:
    """The state holds tensors, of the same shapes and dtypes from call to call."""
    x = case.tree(case.sample())
    rule, state = case.start(x)
    require(state is not None, "None as its state", "Return () where nothing is remembered.")
    others = [leaf for leaf in _tree.leaves(state) if not isinstance(leaf, Tensor)]
    require(not others, f"a state that holds {others}")
    assert_same_layout(case.after(rule, x, state), state, what="a later state")
    devices = {leaf.device.type for leaf in _tree.leaves(state)}
    require(devices <= {torch.device(case.device).type}, f"a state on {devices}")


def fresh_state(case: Case) -> None:
    """`init` reads shapes alone; no state is a fresh state; random rules ask for a key."""
    x = case.sample()
    rule, state = case.start(x)
    blank = case.init(rule, torch.full_like(x, torch.nan))
    assert_trees_close(blank, state, rtol=0, atol=0, what="states of other numbers")
    jac, offset = case.objective()
    if (weigh := getattr(rule, "weighting", None)) is not None:
        blank = weigh.init(torch.full_like(jac @ jac.mT, torch.nan), key=case.key())
        assert_trees_close(blank, state, rtol=0, atol=0, what="states of another Gramian")
    point = torch.zeros_like(jac[0])
    derived = init_state(rule, lambda x: jac @ x + offset, point, key=case.key())
    assert_trees_close(derived, state, rtol=0, atol=0, what="states of jd.init_state and init")
    if case.random:
        refuses(lambda: rule.init(x), "key", "no key")
        refuses(lambda: case.step(rule, x, None), "key", "neither key nor state")
        return
    want = case.step(rule, x, state)
    got = case.step(rule, x, None)
    assert_trees_close(got, want, rtol=0, atol=0, what="results without state and with a fresh one")


def other_state(case: Case) -> Callable[[], Any]:
    """Return a call with a state of another size, or, where no size is kept, of another rule."""
    x = case.sample()
    rule, state = case.start(x)
    if not [leaf for leaf in _tree.leaves(state) if leaf.ndim and leaf.is_floating_point()]:
        return lambda: case.step(rule, x, (torch.zeros_like(x[:, 0] if x.ndim > 1 else x),))
    if case.m is not None:
        return lambda: case.step(rule, x, _tree.map(_longer, state))
    return lambda: case.step(case.rule(2 * len(x)), torch.cat([x, x]), state)


def _longer(leaf: Tensor) -> Tensor:
    return torch.cat([leaf, leaf]) if leaf.ndim and leaf.is_floating_point() else leaf


def state_size(case: Case) -> None:
    """A state of another size is an error, where there is a state."""
    if not _tree.leaves(case.start(case.sample())[1]):
        return
    refuses(other_state(case), "", "a state of another size or rule")


def refuses(call: Callable[[], Any], message: str, what: str) -> None:
    """Check that a call raises an error with some text."""
    try:
        call()
    except Exception as error:
        require(message in str(error), f"an error for {what} that does not name `{message}`")
        return
    raise AssertionError(f"no error for {what}")


def dtypes(case: Case) -> None:
    """What comes in float64, float32 or bfloat16 goes out so, computed in float32 or better."""
    for dtype, tolerance in DTYPES.items():
        x = case.sample().to(dtype)
        rule, state = case.start(case.tree(x))
        got, _ = case.step(rule, case.tree(x), state)
        want, _ = case.step(rule, case.tree(x.double()), case.init(rule, case.tree(x.double())))
        types = {leaf.dtype for leaf in _tree.leaves(got)}
        require(types == {dtype}, f"{sorted(map(str, types))} for {dtype}")
        scale = max(float(leaf.abs().max()) for leaf in _tree.leaves(want))
        wide = _tree.map(lambda leaf: leaf.double(), got)
        what = f"results in {dtype} and in float64"
        assert_trees_close(wide, want, rtol=tolerance, atol=tolerance * scale, what=what)


def pytree(case: Case) -> None:
    """A pytree counts as the matrix, or the vector, of its numbers in leaf order."""
    x = case.sample()
    rule, state = case.start(x)
    got, _ = case.step(rule, case.tree(x), case.init(rule, case.tree(x)))
    want, _ = case.step(rule, x, state)
    if case.scalar:
        assert_trees_close(got[0], want[0], what="losses of a pytree and of a vector")
        got, want = got[1], want[1]
    flat = _tree.ravel(got)
    assert_trees_close(flat, want, what="results of a pytree and of its numbers")


def columns(case: Case) -> None:
    """Some columns give what they give among all others."""
    x = case.sample()
    want, _ = case.step(*_with_state(case, x))
    parts = [case.step(*_with_state(case, part))[0] for part in x.tensor_split([1, 4], dim=1)]
    what = "results of parts of the columns and of all of them"
    assert_trees_close(torch.cat(parts), want, what=what)


def losses(case: Case) -> None:
    """A rule that needs losses says so, any other goes without."""
    x = case.sample()
    rule, state = case.start(x)
    if case.needs_losses:
        refuses(lambda: rule(x, state), "losses", "missing losses")
        return
    rule(x, state)


def zero(case: Case) -> None:
    """Gradients of zero give a direction of zero."""
    x = torch.zeros_like(case.sample())
    got, _ = case.step(*_with_state(case, x))
    assert_trees_close(got, torch.zeros_like(x[0]), rtol=0, atol=0, what="directions")


def _with_state(case: Case, x: Tensor) -> tuple[Any, Tensor, Any]:
    rule, state = case.start(x, len(x))
    return rule, x, state


def single(case: Case) -> None:
    """One objective is descended along its gradient; too few are an error."""
    if case.m is not None:
        return
    x = case.sample(1)
    if case.min_m > 1:
        refuses(lambda: case.step(*_with_state(case, x)), "objective", "one objective")
        return
    got, _ = case.step(*_with_state(case, x))
    finite = all(bool(leaf.isfinite().all()) for leaf in _tree.leaves(got))
    require(finite, f"{got} for one objective", _ONE)
    if case.scalar:
        return
    if not case.keeps_direction:
        require(bool((got * x[0] > 0).all()), f"{got} for the gradient {x[0]}")
        return
    cosine = torch.nn.functional.cosine_similarity(got, x[0], dim=0)
    require(abs(float(cosine) - 1) < 1e-9, f"the cosine {float(cosine)} with the only gradient")


_ONE = (
    "Make it finite for one objective, or raise a ValueError that names the objectives and claim "
    "the smallest number, min_m=2."
)


def shown(case: Case) -> None:
    """A rule and its weighting are shown in one line: their type first, and no address."""
    rule = case.rule()
    for part in (rule, getattr(rule, "weighting", None) or rule):
        text = repr(part)
        sound = (
            text.startswith(f"{type(part).__name__}(") and "\n" not in text and " at 0x" not in text
        )
        require(sound, repr(text))
