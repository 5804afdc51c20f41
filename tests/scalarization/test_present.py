"""Losses that a batch does not have: as if they were not there."""

import itertools
from functools import partial

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, compiled
from tests.scalarizer_registry import METHODS, L, experienced, fresh, vec
from torchjd_func import _tree
from torchjd_func import scalarizers as sc

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
random_methods = pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.random]
)
CHOICES = [torch.tensor(flags) for flags in itertools.product([True, False], repeat=4)]
SOME = [mask for mask in CHOICES if mask.any() and not mask.all()]
MASK = torch.tensor([True, False, True, True])
NONE = torch.zeros(4, dtype=torch.bool)
SPOILT = vec([torch.nan, torch.inf, -torch.inf, 0.0])


def select(tree, mask):
    """Return the parts of the present objectives of a state, or of options."""

    def part(leaf):
        by_objective = isinstance(leaf, torch.Tensor) and leaf.shape == mask.shape
        return leaf[mask] if by_objective else leaf

    return _tree.map(part, tree)


def compact(fn, mask):
    """Return a rule, or a function that is bound to options, for the present losses alone."""
    if isinstance(fn, jd.Scalarizer):
        parts = (fn.init_fn, fn.update_fn, fn.observe)
        return jd.Scalarizer(fn.name, *(compact(part, mask) for part in parts))
    if not isinstance(fn, partial):
        return fn
    args = [compact(value, mask) for value in fn.args]
    return partial(fn.func, *args, **select(fn.keywords, mask))


def step(rule, method, values, state, **options):
    """Return the loss, its derivative by the losses, and the state after an observation."""

    def loss(values):
        return rule(values, state, **options)

    slope, _ = torch.func.grad(loss, has_aux=True)(values)
    value, state = loss(values)
    if rule.observe is not None:
        later = 0.9 * values if method.observes == "losses" else None
        state = rule.observe(later, state, **options)
    return value, slope, state


@every_method
def test_equals_the_scalarizer_of_the_present_losses(method):
    for mask in [] if method.random else SOME:
        rule, state = experienced(method, L)
        alone, own = compact(rule, mask), select(state, mask)
        for _ in range(3):
            values = torch.where(mask, L, SPOILT)
            loss, slope, state = step(rule, method, values, state, present=mask)
            want, expected, own = step(alone, method, L[mask], own)
            assert_trees_close((loss, slope[mask]), (want, expected))
            assert not slope[~mask].any()


@random_methods
def test_random_values_have_the_distribution_of_those_of_the_present_losses(name):
    rule, state = fresh(METHODS[name], L, 4)
    alone, n = compact(rule, MASK), 4000
    keys = jd.random.split(jd.random.key(1), 2 * n)
    values = torch.where(MASK, L, SPOILT)
    got = vmap(lambda key: rule(values, type(state)(key), present=MASK)[0])(keys[:n])
    want = vmap(lambda key: alone(L[MASK], type(state)(key))[0])(keys[n:])
    at = torch.cat([got, want]).sort().values
    shares = [torch.searchsorted(x.sort().values, at, right=True) / n for x in (got, want)]
    assert (shares[0] - shares[1]).abs().max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov, Smirnov
    assert got.isfinite().all()


@every_method
def test_state_of_what_is_absent_stays(method):
    rule, state = experienced(method, L)
    _, _, after = step(rule, method, torch.where(MASK, L, SPOILT), state, present=MASK)
    assert_same_layout(after, state)
    pairs = list(zip(_tree.leaves(after), _tree.leaves(state), strict=True))
    assert all(torch.equal(a[~MASK], b[~MASK]) for a, b in pairs if a.shape == MASK.shape)
    moved = any(not torch.equal(a, b) for a, b in pairs)
    assert moved == (bool(pairs) and not method.learned)


@every_method
def test_without_losses_nothing_happens(method):
    rule, state = experienced(method, L)
    for absent in (NONE, [False] * 4):
        loss, slope, after = step(rule, method, SPOILT, state, present=absent)
        assert_trees_close((loss, slope), (vec(0.0), torch.zeros_like(L)), rtol=0, atol=0)
        assert_trees_close(after, state, rtol=0, atol=0)


@every_method
def test_all_losses_present_is_no_mask(method):
    rule, state = experienced(method, L)
    got = step(rule, method, L, state, present=~NONE)
    assert_trees_close(got, step(rule, method, L, state), rtol=1e-12)


@every_method
def test_flags_may_be_a_tree_like_the_losses(method):
    rule, state = experienced(method, L)
    tree = {"z": L[3], "a": [L[:1], L[1:3]]}
    flags = {"z": True, "a": [torch.tensor([True]), torch.tensor([False, True])]}
    want = rule(L, state, present=MASK)
    assert_trees_close(rule(tree, state, present=flags), want, rtol=0, atol=0)


@every_method
def test_steps_with_absent_losses_are_one_graph_and_map(method):
    rule, state = experienced(method, L)

    def run(mask):
        return step(rule, method, torch.where(mask, L, SPOILT), state, present=mask)

    want = _tree.stack([run(mask) for mask in (MASK, NONE, ~NONE)])
    assert_trees_close(vmap(run)(torch.stack([MASK, NONE, ~NONE])), want, rtol=1e-7)
    fast, counter = compiled(run)
    got = _tree.stack([fast(mask) for mask in (MASK, NONE, ~NONE)])
    assert_trees_close(got, want, rtol=1e-7)
    assert counter.graphs == 1


def test_gradients_of_parameters_are_those_of_the_present_losses():
    def alone(x):
        return {"a": x.square().sum(), "c": x.sum()}

    def slope(fn, x, **options):
        return torch.func.grad(lambda x: sc.stch()(fn(x), **options)[0])(x)

    def padded(x):
        return {**alone(x), "b": torch.full_like(x[0], torch.nan)}

    x, flags = vec([1.0, 2.0]), {"a": True, "b": False, "c": True}
    assert_trees_close(slope(padded, x, present=flags), slope(alone, x))


def test_group_dro_shares_out_the_weight_of_the_present_groups():
    rule, state = sc.group_dro(0.5), None
    for mask in (~NONE, MASK, ~MASK, MASK):
        _, state = rule(L, state, present=mask)
        assert_trees_close(state.log_weights.exp().sum(), vec(1.0))


def test_dwa_averages_over_the_batches_that_have_a_loss():
    rule = sc.dwa()
    assert rule.observe is not None
    state = rule.init(L)
    for mask in (MASK, ~NONE, MASK):
        _, state = rule(L, state, present=mask)
    _, state = rule(vec([9.0] * 4), state, present=~MASK)
    ended = rule.observe(None, state)
    assert_trees_close(ended.newer, torch.where(MASK, L, (L + 9) / 2))
    assert_trees_close(rule.observe(None, ended), ended, rtol=0, atol=0)
    some = rule.observe(SPOILT, ended, present=[False, False, False, True])
    assert_trees_close((some.newer[:3], some.newer[3]), (ended.newer[:3], vec(0.0)))


def test_famo_does_not_observe_what_its_call_did_not_have():
    rule = sc.famo()
    assert rule.observe is not None
    _, state = rule(torch.where(MASK, L, SPOILT), present=MASK)
    after = rule.observe(torch.where(MASK, L / 2, SPOILT), state)
    assert_trees_close(after, rule.observe(L / 2, state, present=MASK))
    assert after.step.tolist() == [1, 0, 1, 1]
    _, state = rule(L, after)
    late = rule.observe(vec([0.4, 2.0, 1.0, 1.5]), state)
    first = (late.logits - after.logits)[1].abs()
    assert_trees_close(first, vec(0.025), rtol=1e-6)  # the first step of Adam has length beta


def half(losses, state):
    """Halve the sum: a user's rule that knows nothing of absent losses."""
    return losses.sum() / 2, state


ERRORS = {
    "no keyword": (jd.Scalarizer("half", lambda losses, key: (), half), MASK, "no keyword"),
    "another size": (sc.mean(), MASK[:3], "hold 4 bools"),
    "numbers": (sc.mean(), L, "torch.float64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_fault(name):
    rule, flags, match = ERRORS[name]
    with pytest.raises(ValueError, match=match):
        rule(L, (), present=flags)
