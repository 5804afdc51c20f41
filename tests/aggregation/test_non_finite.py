"""Non-finite in, non-finite out, and nobody else hurt: contracts over the registry."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.matrices import matrix
from tests.registry import METHODS, fresh, key_for, losses_for
from torchjd_func import _tree

# Their job is to outvote rows that are not finite.
ROBUST = ("krum", "geometric_median", "trimmed_mean", "monitored[trimmed_mean]")
FRAGILE = {name: method for name, method in METHODS.items() if not name.startswith(ROBUST)}
every_method = pytest.mark.parametrize("method", FRAGILE.values(), ids=FRAGILE.keys())
BAD = (torch.nan, torch.inf, -torch.inf)


def spoiled(jac, value):
    """Return the matrix with one entry replaced."""
    jac = jac.clone()
    jac[1, 0] = value
    return jac


def numbers_of(state):
    """Return the floating-point leaves of a state."""
    return [leaf for leaf in _tree.leaves(state) if leaf.is_floating_point()]


@pytest.mark.parametrize("bad", BAD)
@every_method
def test_rows_that_are_not_finite_are_seen_and_leave_the_state(method, bad):
    m = max(3, method.min_m)
    jac, losses = matrix("gaussian", m, 5), losses_for(method, m)
    aggregator, state = fresh(method, jac, m)
    for _ in range(2):
        _, state = aggregator(jac, state, losses=losses)
    grads, after = aggregator(spoiled(jac, bad), state, losses=losses)
    assert not grads.isfinite().all()
    for old, new in zip(numbers_of(state), numbers_of(after), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [name for name in FRAGILE if FRAGILE[name].needs_losses])
def test_losses_that_are_not_finite_are_seen_and_leave_the_state(name, bad):
    method = FRAGILE[name]
    m = max(3, method.min_m)
    jac, losses = matrix("gaussian", m, 5), losses_for(method, m)
    aggregator, state = fresh(method, jac, m)
    _, state = aggregator(jac, state, losses=losses)
    assert losses is not None
    losses[1] = bad
    grads, after = aggregator(jac, state, losses=losses)
    assert not grads.isfinite().all()
    for old, new in zip(numbers_of(state), numbers_of(after), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("rule", [jd.moco(prescale=True), jd.db_mtl(), jd.log_losses(jd.mean())])
def test_losses_that_are_negative_do_not_turn_gradients_round(rule):
    jac, losses = matrix("gaussian", 3, 5), torch.tensor([0.5, -1.0, 2.0])
    assert rule(jac, losses=losses)[0].isnan().all()


@pytest.mark.parametrize("size", [1e-30, 1e25])
@every_method
def test_a_finite_step_of_any_length_leaves_a_finite_state(method, size):
    m = max(3, method.min_m)
    jac, losses = size * matrix("zero", m, 5).float(), losses_for(method, m)
    aggregator, state = fresh(method, jac, m)
    for _ in range(2):
        grads, after = aggregator(jac, state, losses=losses)
        if grads.isfinite().all():
            assert all(leaf.isfinite().all() for leaf in numbers_of(after))
        state = after


@pytest.mark.parametrize("bad", BAD)
@every_method
def test_gramians_that_are_not_finite_give_no_weights(method, bad):
    m = max(3, method.min_m)
    rule = method.make(m).weighting
    if rule is None or rule.needs == "size":
        return
    gramian = spoiled(matrix("gaussian", m, m) @ matrix("gaussian", m, m).mT, bad)
    gramian = 0.5 * (gramian + gramian.mT)
    weights, _ = rule(
        gramian, rule.init(gramian, key=key_for(method)), losses=losses_for(method, m)
    )
    if rule.name.startswith("constant"):
        return
    assert not weights.isfinite().all()


@every_method
def test_members_of_a_population_do_not_disturb_each_other(method):
    m = max(3, method.min_m)
    good, losses = matrix("gaussian", m, 5), losses_for(method, m)
    jacs = torch.stack([good, spoiled(good, torch.nan), good])
    aggregator, state = fresh(method, good, m)
    want, _ = aggregator(good, state, losses=losses)
    got, _ = vmap(lambda jac: aggregator(jac, state, losses=losses))(jacs)
    torch.testing.assert_close(got[0], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[2], want, rtol=1e-9, atol=1e-12)
    assert not got[1].isfinite().all()


@every_method
def test_a_loss_scale_skips_the_steps_that_overflow(method):
    m = max(3, method.min_m)
    target, losses = matrix("gaussian", m, 5).float(), losses_for(method, m)
    aggregator, state = fresh(method, target, m)
    scale, params = jd.loss_scale.init(2.0**15), torch.zeros(5)
    kept = []
    for size in (1.0, 1e3, 1.0, torch.nan, 1.0):
        half = (target * (1 + params) * size * scale.scale).half()  # overflows at 1e3
        jac = half.float() / scale.scale
        grads, new = aggregator(jac, state, losses=losses)
        scale = jd.loss_scale.update(scale, grads)
        moved = params - 1e-3 * grads
        params, state = jd.loss_scale.keep(scale, (moved, new), (params, state))
        kept.append(bool(scale.finite))
    assert kept == [True, False, True, False, True]
    assert params.isfinite().all()
