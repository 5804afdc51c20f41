"""With `present`, a method does what it does with the present rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import torchjd_func as jd
from tests.helpers import assert_trees_close, compiled, weighting
from tests.matrices import KINDS, matrix
from tests.registry import METHODS, Method, fresh, key_for
from torchjd_func import _tree

N_CALLS = 3


def size(method: Method) -> int:
    """A number of objectives of which some can be absent."""
    return method.min_m + 3


def masks(method: Method) -> dict[str, Tensor]:
    """Masks with enough objectives for the method."""
    m, least = size(method), method.min_m
    place = torch.arange(m)
    return {
        "first absent": place > 0,
        "last absent": place < m - 1,
        "fewest": (place > 0) & (place <= least),
        "some": (place % 2 == 0) | (place < least),
    }


def batches(m: int) -> tuple[Tensor, Tensor]:
    """Jacobians `(calls, m, n)` and losses `(calls, m)`, of which all are present."""
    jacs = torch.stack([matrix("gaussian", m, 6, seed=seed) for seed in range(N_CALLS)])
    losses = torch.stack([torch.linspace(0.5, 2.0 + t, m).double() for t in range(N_CALLS)])
    return jacs, losses


def sequence(method: Method, rule, jacs, losses, *, key=None, present=None):
    """Call a rule several times, from a fresh state."""
    state, grads = rule.init(jacs[0], key=key), []
    for jac, values in zip(jacs, losses, strict=True):
        known = values if method.needs_losses else None
        update, state = rule(jac, state, losses=known, present=present)
        grads.append(update)
    return torch.stack(grads), state


def without(mask: Tensor, values: Tensor) -> Tensor:
    """Put not-a-number in the place of what is absent."""
    return torch.where(mask.reshape(1, -1, *[1] * (values.ndim - 2)), values, torch.nan)


def alone(method: Method, mask: Tensor):
    """The rule for the present objectives, with the preference restricted to them."""
    return method.among([place for place, here in enumerate(mask.tolist()) if here])


@pytest.mark.parametrize("which", ["first absent", "last absent", "fewest", "some"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.random])
def test_equals_the_rule_on_the_present_rows(name, which):
    method = METHODS[name]
    mask = masks(method)[which]
    jacs, losses = batches(size(method))
    want, _ = sequence(method, alone(method, mask), jacs[:, mask], losses[:, mask])
    rule = method.make(size(method))
    got, _ = sequence(method, rule, without(mask, jacs), without(mask, losses), present=mask)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("which", ["first absent", "fewest"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
def test_random_rules_have_the_distribution_of_the_present_rows(name, which):
    method, n_draws = METHODS[name], 2000
    mask = masks(method)[which]
    jacs, losses = batches(size(method))
    one, rule = alone(method, mask), method.make(size(method))
    keys = jd.random.split(jd.random.key(3), n_draws)
    want = vmap(lambda key: sequence(method, one, jacs[:, mask], losses[:, mask], key=key)[0])(keys)
    seen, known = without(mask, jacs), without(mask, losses)
    got = vmap(lambda key: sequence(method, rule, seen, known, key=key, present=mask)[0])(keys)
    for moment in (torch.Tensor.mean, torch.Tensor.std):
        scale = want.std(0) + got.std(0)
        far = (moment(got, 0) - moment(want, 0)).abs() > 5 * scale / n_draws**0.5 + 1e-9
        assert not far.any()


@pytest.mark.parametrize("name", METHODS)
def test_all_present_is_no_mask(name):
    method = METHODS[name]
    m = size(method)
    jacs, losses = batches(m)
    rule, key = method.make(m), key_for(method)
    want = sequence(method, rule, jacs, losses, key=key)
    got = sequence(method, rule, jacs, losses, key=key, present=torch.ones(m, dtype=torch.bool))
    assert_trees_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_all_absent_is_zero_and_keeps_the_state(name):
    method = METHODS[name]
    m = size(method)
    jacs, losses = batches(m)
    rule = method.make(m)
    _, state = sequence(method, rule, jacs, losses, key=key_for(method))
    nothing = torch.full_like(jacs[0], torch.nan)
    grads, after = rule(nothing, state, losses=nothing[:, 0], present=torch.zeros(m) > 0)
    assert_trees_close((grads, after), (torch.zeros_like(grads), state), rtol=0, atol=0)


def memory(state):
    """A state without what is only shown: measures of absent objectives are not-a-number."""
    return state.inner if hasattr(state, "measures") else state


def of_objectives(state, m: int) -> list[Tensor]:
    """The parts of a state that belong to the objectives one by one."""
    return [leaf for leaf in _tree.leaves(state) if leaf.ndim and leaf.shape[0] == m]


@pytest.mark.parametrize("name", METHODS)
def test_absent_objectives_keep_their_part_of_the_state(name):
    method = METHODS[name]
    m = size(method)
    mask = masks(method)["some"]
    jacs, losses = batches(m)
    rule = method.make(m)
    _, state = sequence(method, rule, jacs, losses, key=key_for(method))
    jac, values = without(mask, jacs)[0], without(mask, losses)[0]
    state, after = memory(state), memory(rule(jac, state, losses=values, present=mask)[1])
    for old, new in zip(of_objectives(state, m), of_objectives(after, m), strict=True):
        torch.testing.assert_close(new[~mask], old[~mask], rtol=0, atol=0)
    assert all(leaf.isfinite().all() for leaf in _tree.leaves(after))


@pytest.mark.parametrize("name", METHODS)
def test_is_captured_as_one_graph(name):
    method = METHODS[name]
    mask = masks(method)["some"]
    jacs, losses = batches(size(method))
    rule, state = fresh(method, jacs[0], size(method))

    def call(jac, state, values, present):
        return rule(jac, state, losses=values, present=present)

    fast, counter = compiled(call)
    for present in (mask, mask.flip(0) | mask):
        seen, known = without(present, jacs)[0], without(present, losses)[0]
        assert_trees_close(
            fast(seen, state, known, present), call(seen, state, known, present), rtol=1e-7
        )
    assert counter.graphs == 1


@pytest.mark.parametrize("name", METHODS)
def test_masks_can_be_mapped(name):
    method = METHODS[name]
    jacs, losses = batches(size(method))
    rule = method.make(size(method))
    each = torch.stack([*masks(method).values(), torch.zeros(size(method)) > 0])

    def call(present):
        seen, known = without(present, jacs), without(present, losses)
        return sequence(method, rule, seen, known, key=key_for(method), present=present)

    want = _tree.stack([call(mask) for mask in each])
    assert_trees_close(vmap(call)(each), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.differentiable]
)
def test_absent_rows_leave_derivatives_finite(name):
    method = METHODS[name]
    mask = masks(method)["fewest"]
    jacs, losses = batches(size(method))
    rule, state = fresh(method, jacs[0], size(method))
    known = without(mask, losses)[0]

    def length(jac):
        return rule(jac, state, losses=known, present=mask)[0].square().sum()

    slope = grad(length)(without(mask, jacs)[0])
    assert slope.isfinite().all()
    assert (slope[~mask] == 0).all()


def test_too_few_rows_for_krum_and_the_trimmed_mean_are_not_a_number():
    jac = matrix("gaussian", 6, 4)
    for rule, least in ((jd.krum(1), 4), (jd.krum(0, 3), 3), (jd.trimmed_mean(2), 5)):
        for count in range(1, 7):
            grads, _ = rule(jac, present=torch.arange(6) < count)
            assert bool(grads.isnan().all()) == (count < least)
            assert bool(grads.isfinite().all()) == (count >= least)


def test_the_first_present_objective_is_the_primary_one_of_pcd():
    jac, tau = matrix("gaussian", 4, 6), torch.tensor([0.1, 0.4, 0.9])
    mask = torch.tensor([False, True, False, True])
    rule, alone = jd.pcd(tau), jd.pcd(tau[2:])
    state, lone = rule.init(jac), alone.init(jac[mask])
    for scale in (1.0, 2.0, 5.0):
        got, state = rule(scale * jac, state, present=mask)
        want, lone = alone(scale * jac[mask], lone)
        torch.testing.assert_close(got, want)


def test_flags_may_be_those_of_numpy():
    jac, flags = matrix("gaussian", 3, 6), [True, False, True]
    want = jd.upgrad()(jac, present=torch.tensor(flags))[0]
    assert torch.equal(jd.upgrad()(jac, present=[np.bool_(flag) for flag in flags])[0], want)


def test_config_momentum_visits_the_present_objectives_in_turn():
    jac, mask = matrix("gaussian", 4, 6), torch.tensor([True, False, True, True])
    rule = jd.config_momentum()
    state, alone = rule.init(jac), rule.init(jac[mask])
    for scale in range(1, 7):
        got, state = rule(scale * jac, state, present=mask)
        want, alone = rule(scale * jac[mask], alone)
        torch.testing.assert_close(got, want)
    assert state.visits.tolist() == [2, 0, 2, 2]


STEPPED = {"gradnorm": jd.gradnorm(), "modo": jd.weighted(jd.modo()), "moco": jd.moco()}


@pytest.mark.parametrize("name", STEPPED)
def test_weights_of_a_fixed_sum_keep_it_where_objectives_come_and_go(name):
    rule, m = STEPPED[name], 4
    jacs, losses = batches(m)
    state = rule.init(jacs[0])
    total = state.weights.sum()
    for mask in torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]) > 0:
        before = state.weights
        _, state = rule(jacs[0], state, losses=losses[0], present=mask)
        torch.testing.assert_close(state.weights.sum(), total)
        torch.testing.assert_close(state.weights[~mask], before[~mask], rtol=0, atol=0)


def test_an_objective_that_comes_late_starts_as_one_that_was_there():
    jac, losses = matrix("gaussian", 3, 5), torch.tensor([4.0, 2.0, 1.0]).double()
    late = torch.tensor([True, True, False])
    _, state = jd.gradnorm()(jac, losses=losses, present=late)
    assert state.visits.tolist() == [1, 1, 0]
    _, state = jd.gradnorm()(jac, state, losses=losses / 2)
    assert state.initial_losses.tolist() == [4.0, 2.0, 0.5]

    rule = jd.excess_mtl(n_warmup_steps=2)
    _, state = rule(jac, present=late)
    _, state = rule(jac, state)
    first = rule(jac)[1]
    torch.testing.assert_close(state.baseline[2], first.baseline[2])

    rule = weighting(jd.nash_mtl(update_every=3))
    gramian = jac @ jac.mT
    _, state = rule(gramian, present=late)
    torch.testing.assert_close(rule(gramian, state)[0], rule(gramian)[0])


def test_weights_that_are_all_zero_become_equal():
    rule = jd.modo()
    state = rule.init(torch.eye(3, dtype=torch.float64))
    state = state._replace(weights=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    mask = torch.tensor([False, True, True])
    weights, after = rule(torch.eye(3, dtype=torch.float64), state, present=mask)
    assert weights.tolist() == [0.0, 0.5, 0.5]
    assert after.weights.tolist() == [1.0, 0.0, 0.0]


def test_a_point_at_the_origin_is_no_median_if_it_is_absent():
    jac = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    present = torch.tensor([False, True, True])
    weights, _ = weighting(jd.geometric_median())(jac @ jac.mT, present=present)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64))


SWEEPS = {
    "upgrad": jd.upgrad,
    "dualproj": jd.dualproj,
    "aligned_mtl": jd.aligned_mtl,
    "config": jd.config,
    "geometric_median": jd.geometric_median,
    "epo": jd.epo,
    "pmgda": jd.pmgda,
    "constant": jd.constant,
    "cagrad": lambda p: jd.cagrad(p[0]),
    "fairgrad": lambda p: jd.fairgrad(p[0]),
    "nash_mtl": lambda p: jd.nash_mtl(p[0]),
    "pcd": lambda p: jd.pcd(p[1:]),
    "gradnorm": lambda p: jd.gradnorm(p[0]),
    "sdmgrad": lambda p: jd.weighted(jd.sdmgrad(p[0], p)),
    "moco": lambda p: jd.moco(gamma=p[0]),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_rules_can_be_mapped_with_a_mask(name):
    jac, losses = matrix("gaussian", 3, 5), torch.tensor([1.0, 2.0, 0.5]).double()
    options = torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.6, 0.3]]).double()
    masks = torch.tensor([[True, False, True], [False, True, True]])

    def call(option, present):
        rule = SWEEPS[name](option)
        return rule(jac, losses=losses, present=present)

    want = [call(*pair) for pair in zip(options, masks, strict=True)]
    assert_trees_close(vmap(call)(options, masks), _tree.stack(want), rtol=1e-7, atol=1e-9)
    fixed = _tree.stack([call(option, masks[0]) for option in options])
    got = vmap(call, in_dims=(0, None))(options, masks[0])
    assert_trees_close(got, fixed, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [n for n, method in METHODS.items() if method.unique and not method.random]
)
def test_equals_the_rule_on_present_rows_of_any_kind(name, kind):
    method = METHODS[name]
    mask, jac = masks(method)["some"], matrix(kind, size(method), 4, seed=1)
    losses = batches(size(method))[1]
    one, rule = alone(method, mask), method.make(size(method))
    want, _ = sequence(method, one, jac[mask].unsqueeze(0), losses[:1, mask])
    seen = without(mask, jac.unsqueeze(0))
    got, _ = sequence(method, rule, seen, without(mask, losses[:1]), present=mask)
    assert float((got - want).norm()) <= 1e-6 * float(want.norm()) + 1e-9 * float(jac[mask].norm())
