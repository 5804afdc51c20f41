"""A good rule passes `jd.testing.check`; a rule with one fault fails the check that is about it."""

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import torchjd_func as jd
from torchjd_func import _tree
from torchjd_func.testing import CHECKS, Case


def no_state(like, key):
    return ()


def weighting(update, init=no_state, name="mine", **options):
    return jd.weighted(jd.Weighting(name, init, update, **options))


def stateless(fn, **options):
    return jd.weighted(jd.stateless("mine", fn, **options))


def agreement(gramian, present=None):
    """The share of gradients that each does not conflict with."""
    there = torch.ones_like(gramian[0]) if present is None else present.double()
    return there * ((gramian >= 0) * there).sum(1) * gramian[0].isfinite().all() / there.sum() ** 2


def averaged(gramian, present=None):
    there = torch.ones_like(gramian[0]) if present is None else present.double()
    return there / there.sum()


class Memory(NamedTuple):
    """A running mean of the squared lengths."""

    squares: torch.Tensor  # (m,)
    steps: torch.Tensor  # ()


def start(statistic, key):
    zeros = statistic.new_zeros(len(statistic), dtype=torch.float64)
    return Memory(zeros, zeros.new_zeros((), dtype=torch.int64))


def remember(gramian, state, losses, present=None):
    there = torch.ones_like(state.squares) if present is None else present.double()
    moved = torch.lerp(state.squares, gramian.diagonal(), 0.1)
    squares = torch.where(there > 0, moved, state.squares)
    weights = there / (1 + squares)
    return weights, Memory(squares, state.steps + 1)


class Source(NamedTuple):
    """A key."""

    key: torch.Tensor


def drawn(gramian, state, losses, present=None):
    key, draw = jd.random.split(state.key)
    weights = jd.random.uniform(draw, (len(gramian),), dtype=gramian.dtype)
    return weights if present is None else weights * present, Source(key)


def source(statistic, key):
    if key is None:
        raise ValueError("key")
    return Source(key)


def power(losses, state, present=None):
    there = torch.ones_like(losses) if present is None else present.to(losses.dtype)
    return (there * losses).square().sum().sqrt(), state


GOOD = {
    "weighting": (jd.stateless("mine", averaged), {"equivariant": True, "degree": 1}),
    "aggregator": (stateless(agreement), {"equivariant": True, "degree": 1, "weighted": True}),
    "state": (weighting(remember, start), {"equivariant": True}),
    "random": (weighting(drawn, source), {"random": True}),
    "factory": (
        lambda m: stateless(lambda gramian: gramian.new_tensor([1.0 + i for i in range(m)])),
        {"present": False, "degree": 1, "linear_under_scaling": True},
    ),
    "numbers": (
        stateless(lambda gramian: gramian.new_tensor([1.0, 2.0, 3.0, 4.0])),
        {"m": 4, "present": False},
    ),
    "scalarizer": (
        jd.Scalarizer("mine", no_state, power),
        {"equivariant": True, "degree": 1},
    ),
    "of the library": (jd.upgrad(), {"present": False, "non_conflicting": True, "weighted": True}),
}


@pytest.mark.parametrize(("rule", "claims"), GOOD.values(), ids=GOOD.keys())
def test_a_good_rule_passes(rule, claims, device):
    jd.testing.check(rule, device=device, **claims)


def halved(jac, state, losses):
    return _tree.map(lambda leaf: leaf.div_(2).sum(0), jac), state


def scaled_in_place(gramian):
    return gramian.mul_(2.0)[0]


calls = []


def counted(gramian):
    calls.append(0)
    return torch.full_like(gramian[0], len(calls))


def global_draw(gramian):
    return torch.rand(len(gramian)).double()


def growing(gramian, state, losses):
    return gramian[0], (torch.ones(1),) if state == () else state


def python_counter(gramian, state, losses):
    return torch.ones_like(gramian[0]), (state[0] + 1,)


def curious(jac, key):
    return (jac[:, 0].double(),)


def curious_weighting(statistic, key):
    return Memory(statistic.diagonal().double(), torch.tensor(0))


def one_number(like, key):
    return (0,)


def any_state(gramian, state, losses):
    return torch.ones_like(gramian[0]), state


def narrow(jac, state, losses):
    return jac.mean(0) if isinstance(jac, torch.Tensor) else jac["z"][0].mean(0), state


def widened(jac, state, losses):
    return _tree.map(lambda leaf: leaf.double().mean(0), jac), state


def first_leaf(jac, state, losses):
    first = _tree.leaves(jac)[0].flatten(1).norm(dim=1)
    weights = (first / first.sum()).to(first.dtype)
    return _tree.weighted_sum(jac, weights), state


def silent_losses(gramian, state, losses):
    return torch.ones_like(gramian[0]) if losses is None else losses, state


def unguarded(gramian):
    return 1 / gramian.diagonal()


def uphill(gramian):
    return -torch.ones_like(gramian[0])


def read_out(gramian):
    return gramian[0] * 0 + gramian.trace().item()


def branching(gramian):
    return gramian[0] if gramian.trace() > 1 else 2 * gramian[0]


def unbatched(gramian):
    out = torch.zeros(len(gramian), dtype=gramian.dtype)
    out[gramian.diagonal().argmax()] = 1
    return out


def constant_part(gramian):
    return gramian.diagonal().detach()


def root_of_zero(gramian):
    return torch.where(gramian > 1e9, (gramian - gramian).sqrt(), gramian).sum(0)


def cleaned(gramian):
    return 0 * torch.nan_to_num(gramian).sum(0) + 1


def hides_nan(jac, state, losses):
    return _tree.map(lambda leaf: leaf.nan_to_num(0, 0, 0).mean(0), jac), state


def ignores_present(gramian, present=None):
    return torch.full_like(gramian[0], 1 / len(gramian))


def first_wins(gramian):
    return torch.cat([gramian.new_ones(1), gramian.new_zeros(len(gramian) - 1)])


def absolute(gramian):
    return 1 / (gramian.diagonal() + 1)


def normalized(gramian):
    return 1 / gramian.diagonal().clamp(min=1e-300).sqrt()


def shifted(jac, state, losses):
    return _tree.map(lambda leaf: leaf.sum(0) + leaf.norm(), jac), state


def aggregator(update, init=no_state, **options):
    return jd.Aggregator("mine", init, update, **options)


def largest(losses, state, present=None):
    return losses.max(), state


def smallest(losses, state, present=None):
    return losses.min(), state


def by_lengths(jac, state, losses):
    rows = torch.cat([leaf.flatten(1) for leaf in _tree.leaves(jac)], dim=1)
    return _tree.weighted_sum(jac, 1 / rows.norm(dim=1)), state


def two_routes(statistic, state, losses):
    return torch.ones_like(statistic[0]), state


def mean_of_rows(jac, state, losses):
    return _tree.map(lambda leaf: leaf.mean(0), jac), state


FAULTS = {
    "call": (aggregator(narrow), {}, "pytree like the Jacobian"),
    "purity": (aggregator(halved), {}, "numbers in the first argument"),
    "purity (Gramian)": (stateless(scaled_in_place, widen=False), {}, "numbers in the Gramian"),
    "repeatable": (stateless(counted), {}, "same call"),
    "repeatable (generator)": (stateless(global_draw), {}, "global generator"),
    "state": (weighting(growing), {}, "structure"),
    "state (a number)": (weighting(python_counter, one_number), {}, r"holds \[0\]"),
    "fresh state": (aggregator(mean_of_rows, curious), {}, "states of other numbers"),
    "fresh state (Gramian)": (weighting(remember, curious_weighting), {}, "another Gramian"),
    "fresh state (key)": (jd.rlw(), {"random": False}, "random=True"),
    "state size": (weighting(any_state, start), {}, "no error for a state of another size"),
    "dtypes": (aggregator(widened), {}, "float64.* for torch.float32"),
    "pytree": (aggregator(first_leaf), {}, "pytree"),
    "columns": (aggregator(by_lengths, columnwise=True), {}, "parts of the columns"),
    "losses": (weighting(silent_losses), {"needs_losses": True}, "no error for missing losses"),
    "zero": (stateless(unguarded), {}, "torch.where"),
    "one objective": (stateless(uphill), {}, "cosine -1"),
    "one objective (too few)": (jd.mean(), {"min_m": 2}, "no error for one objective"),
    "repr": (jd.weighted(jd.stateless("two\nlines", averaged)), {}, "one line"),
    "compile": (stateless(branching), {}, "`if` on a tensor"),
    "vmap": (stateless(read_out), {}, r"\.item\(\)"),
    "vmap (in place)": (stateless(unbatched), {}, "in place"),
    "vmap (a branch)": (stateless(branching), {}, "torch.where for `if`"),
    "routes": (
        jd.Aggregator(
            "mine",
            no_state,
            mean_of_rows,
            jd.Weighting("mine", lambda s, key: (), two_routes),
        ),
        {},
        "route",
    ),
    "derivative": (stateless(constant_part), {}, "differences"),
    "derivative (not finite)": (stateless(root_of_zero), {}, "nan"),
    "non-finite rows": (aggregator(hides_nan), {}, "finite result"),
    "absent rows": (stateless(ignores_present), {"present": True}, "absent"),
    "absent rows (below 1)": (jd.Scalarizer("m", no_state, largest), {"present": True}, "present"),
    "absent rows (above 1)": (jd.Scalarizer("m", no_state, smallest), {"present": True}, "present"),
    "absent rows (not taken)": (stateless(lambda g: g[0]), {"present": True}, "present=None"),
    "permutation": (stateless(first_wins), {"equivariant": True}, "another order"),
    "scale": (stateless(absolute), {"degree": 1}, "at the scale"),
    "non-conflicting": (jd.mean(), {"non_conflicting": True}, "cosine"),
    "linear under scaling": (
        stateless(normalized),
        {"linear_under_scaling": True},
        "sums of scaled",
    ),
    "weighted": (aggregator(shifted), {"weighted": True}, "span"),
}


# Where the remedy depends on the case.
REMEDIES = {
    "call": "by optree.tree_map(fn, jac).",
    "derivative": "claim differentiable=False.",
    "non-finite rows": "or claim drops_non_finite=True.",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name):
    rule, claims, message = FAULTS[name]
    case = Case(lambda m: rule, **({"present": False} | claims))
    check = CHECKS[name.split(" (")[0]]
    assert check.applies(case)
    with pytest.raises(AssertionError, match=message) as caught:
        check(case)
    text = str(caught.value)
    assert text.startswith(f"`{rule.name}` must {check.must}, got ")
    assert text.endswith(REMEDIES.get(name, f". {check.remedy}"))


def test_every_check_has_a_faulty_rule():
    assert {name.split(" (")[0] for name in FAULTS} == set(CHECKS)


def test_all_failures_are_listed():
    with pytest.raises(AssertionError, match=r"^\d+ of \d+ checks failed") as caught:
        jd.testing.check(stateless(branching), present=False, degree=7)
    for name in ("compile", "vmap", "scale"):
        assert f"\n- {name}: `mine` must" in str(caught.value)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match="rule"):
        jd.testing.check(lambda m: 3)


def swapped(gramian, state, losses):
    return state, gramian[0]


def whole(gramian, state, losses):
    return gramian, state


def weights_alone(gramian, state, losses):
    return gramian[0]


def rows_kept(jac, state, losses):
    return jac, state


def swapped_grads(jac, state, losses):
    return state, _tree.map(lambda leaf: leaf.mean(0), jac)


def columns_summed(jac, state, losses):
    return _tree.map(lambda leaf: leaf.flatten(1).sum(1), jac), state


def grads_alone(jac, state, losses):
    return _tree.map(lambda leaf: leaf.mean(0), jac)


def vector_loss(losses, state):
    return losses, state


def loss_alone(losses, state):
    return losses.sum()


def constant_loss(losses, state):
    return losses.detach().sum(), state


def scalarizer(update, observe=None):
    return jd.Scalarizer("mine", no_state, update, observe)


RETURNED = {
    "weights alone": (weighting(weights_alone), "return (weights, state), got a tensor"),
    "swapped": (weighting(swapped), "be a tensor of shape (3,), one for each gradient, got ()"),
    "a matrix": (weighting(whole), "one for each gradient, got a tensor of shape (3, 3)"),
    "a pair": (stateless(lambda g: (g[0], ())), "got (a tensor of shape (3,)"),
    "grads alone": (aggregator(grads_alone), "return (grads, state), got"),
    "swapped grads": (aggregator(swapped_grads), "be a pytree like the Jacobian"),
    "rows": (aggregator(rows_kept), "be a pytree like the Jacobian"),
    "columns": (aggregator(columns_summed), "be a pytree like the Jacobian"),
    "loss alone": (scalarizer(loss_alone), "return (loss, state), got a tensor"),
    "a number as state": (weighting(python_counter, one_number), "hold tensors, got int"),
    "a vector": (scalarizer(vector_loss), "be a 0-d tensor, got a tensor of shape (3,)"),
}


def call(rule):
    x = torch.eye(3)[:, :2]
    return rule(x.sum(1) if isinstance(rule, jd.Scalarizer) else x)


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_is_checked_eager_and_traced(name):
    rule, message = RETURNED[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call(rule)
    traced = torch.compile(call, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=re.escape(message.partition(", got")[0])):
        traced(rule)
    with pytest.raises(AssertionError) as failed:
        jd.testing.check(rule, present=False)
    assert message.partition(", got")[0] in str(failed.value)
    assert "others need it" in str(failed.value)


@pytest.mark.parametrize("claims", [{}, {"differentiable": False}])
def test_a_detached_loss_is_named(claims):
    rule = scalarizer(constant_loss)
    with pytest.raises(AssertionError, match="Do not detach the losses"):
        jd.testing.check(rule, present=False, **claims)
    with pytest.raises(ValueError, match="must depend on the losses, got a constant"):
        jd.grad(torch.square, rule)((), torch.ones(3))


def test_detached_weights_are_claimed():
    rule = scalarizer(lambda losses, state: (losses.softmax(0).detach() @ losses, state))
    jd.testing.check(rule, present=False, differentiable=False)
    with pytest.raises(AssertionError, match=r"weights are detached.* claim differentiable=False"):
        CHECKS["derivative"](Case(lambda m: rule, present=False))


def inverse(power=1.0):
    return stateless(lambda gramian: gramian.diagonal() ** -power)


def needy(power):
    return inverse(power)


MISUSED = {
    "unknown": (jd.mean(), {"equivarant": True}, TypeError, "min_m, .* Did you mean equivariant?"),
    "value": (jd.mean(), {"present": "no"}, TypeError, "`present` must be True or False"),
    "degree": (jd.mean(), {"degree": True}, TypeError, "`degree` must be a number"),
    "observes": (jd.scalarizers.famo(), {"observes": "loss"}, ValueError, "one of"),
    "kind": (jd.scalarizers.mean(), {"weighted": True}, ValueError, "claimed of a jd.Aggregator"),
    "factory": (inverse, {}, TypeError, r"Call the factory, jd.testing.check\(inverse\(\)\)"),
    "needy": (needy, {}, TypeError, r"a function of power. Call the factory, .*needy\(...\)"),
    "a name": ("upgrad", {}, TypeError, "Call the factory"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misuse_is_refused(name):
    rule, claims, kind, message = MISUSED[name]
    with pytest.raises(kind, match=message):
        jd.testing.check(rule, **claims)


def rows_of_a_matrix(jac, state, losses):
    return jac.mean(0), state


def without_losses(gramian, state):
    return gramian[0], state


NEEDS = {
    "random": (jd.rlw(), {}, "Claim random=True."),
    "losses": (jd.gradnorm(lr=0.1), {}, "Claim needs_losses=True."),
    "more": (jd.krum(1), {}, "Claim min_m=4."),
    "some": (jd.constant([1.0] * 4), {}, "Claim m=4."),
    "other": (jd.constant([1.0] * 4), {"m": 2}, "Claim m=4."),
    "pytree": (aggregator(rows_of_a_matrix), {}, "by optree.tree_map(fn, jac)."),
    "signature": (weighting(without_losses), {}, "an `observe` with (losses, state)."),
    "observe": (scalarizer(power, lambda losses: ()), {}, "an `observe` with (losses, state)."),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_call_needs_is_named(name):
    rule, claims, remedy = NEEDS[name]
    with pytest.raises(AssertionError) as caught:
        CHECKS["call"](Case(lambda m: rule, **claims))
    assert str(caught.value).endswith(remedy)


def outvoted(leaf):
    return leaf.median(0).values


def dropped(leaf):
    return leaf.nanmedian(0).values + 0 * leaf.nan_to_num(nan=0.0, posinf=torch.inf).sum(0)


NON_FINITE = {
    "outvoted": (outvoted, False, "inf is outvoted, and NaN is not: add 0 * rows.sum(0)"),
    "dropped": (dropped, False, "NaN is left out, and inf is not: add 0 * rows.sum(0)"),
    "claimed": (outvoted, True, "It claims drops_non_finite=True: take out rows"),
}


@pytest.mark.parametrize("name", NON_FINITE)
def test_what_is_not_finite_is_told_apart(name):
    fn, claimed, message = NON_FINITE[name]
    rule = aggregator(lambda jac, state, losses: (_tree.map(fn, jac), state))
    with pytest.raises(AssertionError, match=re.escape(message)):
        CHECKS["non-finite rows"](Case(lambda m: rule, drops_non_finite=claimed))


def test_the_degree_that_fits_is_named():
    for rule, degree in ((jd.mean(), 1), (inverse(1.0), -1), (inverse(0.75), -0.5)):
        with pytest.raises(AssertionError, match=rf"claim degree={degree}\.$"):
            CHECKS["scale"](Case(lambda m, rule=rule: rule, degree=3))


def test_one_cause_is_shown_once():
    with pytest.raises(AssertionError) as caught:
        jd.testing.check(stateless(global_draw), present=False)
    first, second, third = str(caught.value).splitlines()
    assert first.endswith("checks failed:")
    assert second.startswith("- repeatable: ")
    assert third.startswith("  Likely to follow from it: ")
    assert "vmap" in third


def test_the_same_error_is_shown_once():
    with pytest.raises(AssertionError, match=r"\n  The same in: non-finite rows\.") as caught:
        jd.testing.check(stateless(branching), present=False)
    assert str(caught.value).count("data-dependent control flow") == 1
    assert "(line " in str(caught.value)


def test_a_key_is_asked_for():
    key = jd.random.key(0)
    assert jd.random.required(key, "mine") is key
    with pytest.raises(ValueError, match="`key` must be given to `mine`"):
        jd.random.required(None, "mine")


ELSEWHERE = """
import sys
import torchjd_func as jd
jd.testing.check(jd.sum())
assert not [name for name in sys.modules if name.partition(".")[0] in ("tests", "pytest")]
"""


def test_it_needs_neither_a_checkout_nor_pytest(tmp_path):
    package = pathlib.Path(jd.__file__).parent
    (tmp_path / package.name).symlink_to(package)
    command, places = [sys.executable, "-c", ELSEWHERE], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | places
    )
    assert done.returncode == 0, done.stderr
