"""What every scalarizer promises, whatever it computes."""

from dataclasses import replace

import pytest
import torch

import torchjd_func as jd
from tests.helpers import assert_trees_close
from tests.scalarizer_registry import (
    METHODS,
    L,
    experienced,
    exported,
    fresh,
    gradient,
    key_for,
    losses,
    observe,
)
from torchjd_func import _tree
from torchjd_func.testing import CHECKS
from torchjd_func.testing._contract import other_state

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def test_every_exported_scalarizer_is_listed():
    assert {exported(name) for name in METHODS} == set(jd.scalarizers.__all__)


PAIRS = [
    pytest.param(method, CHECKS[check], id=f"{check}-{name}")
    for name, method in METHODS.items()
    for check in CHECKS
    if CHECKS[check].applies(method)
]


@pytest.mark.parametrize(("method", "check"), PAIRS)
def test_contract(method, check, device):
    check(replace(method, device=device))


@every_method
def test_wrong_use_is_a_clear_error(method, device):
    case = replace(method, device=device)
    with pytest.raises(ValueError, match="state"):
        other_state(case)()
    if method.random:
        with pytest.raises(ValueError, match=r"jd\.random\.key"):
            case.rule().init(case.sample())


@every_method
def test_none_is_a_pytree_without_losses(method):
    tree = {"z": L[3], "a": (L[:2].reshape(1, 2), None), "b": [L[2:3]]}
    scalarizer, state = fresh(method, tree, 4)
    vector_state = scalarizer.init(L, key=key_for(method))
    assert_trees_close(scalarizer(tree, state), scalarizer(L, vector_state), rtol=0, atol=0)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_is_kept_in_float32_or_better(method, dtype):
    _, state = fresh(method, L.to(dtype), 4)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    floating = [leaf for leaf in _tree.leaves(state) if leaf.is_floating_point()]
    assert all(leaf.dtype == want for leaf in floating)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_keeps_the_dtypes_that_it_began_with(method, dtype):
    scalarizer, state = experienced(method, L.float())
    loss, later = scalarizer(L.to(dtype), state)
    later = observe(method, scalarizer, L.to(dtype), later)
    assert loss.dtype == dtype
    assert [x.dtype for x in _tree.leaves(later)] == [x.dtype for x in _tree.leaves(state)]


@every_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_that_are_not_finite_leave_the_state(method, bad, masked):
    scalarizer, state = experienced(method, L)
    spoiled, present = L.clone(), torch.tensor([True, True, True, False]) if masked else None
    spoiled[1] = bad
    loss, after = scalarizer(spoiled, state, present=present)
    assert loss.isnan() or not torch.tensor(bad).isnan()
    assert_trees_close(after, state, rtol=0, atol=0)
    _, called = scalarizer(L, state)
    if method.observes == "losses":
        assert_trees_close(observe(method, scalarizer, spoiled, called), called, rtol=0, atol=0)


def test_losses_below_the_least_ones_leave_the_state_of_famo():
    scalarizer = jd.scalarizers.famo(min_losses=[0.5] * 4)
    _, state = scalarizer(L + 1)
    assert scalarizer.observe is not None
    assert_trees_close(scalarizer.observe(0.1 * L, state), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.learned])
def test_a_learned_state_stays_what_its_optimizer_has(name):
    scalarizer, state = experienced(METHODS[name], L)
    for losses_of_a_batch in (L, torch.nan * L):
        after = scalarizer(losses_of_a_batch, state)[1]
        assert all(new is old for new, old in zip(after, state, strict=True))


@every_method
def test_loss_is_not_computed_in_low_precision(method):
    values = L.to(torch.bfloat16)
    scalarizer, state = fresh(method, values, 4)
    wide, _ = scalarizer(values.float(), state)
    assert torch.equal(scalarizer(values, state)[0], wide.to(torch.bfloat16))


@every_method
def test_state_holds_no_graph(method):
    scalarizer, state = fresh(method, L, 4)
    values = L.clone().requires_grad_()
    _, later = scalarizer(values, state)
    later = observe(method, scalarizer, values, later)
    assert not any(leaf.requires_grad for leaf in _tree.leaves(later))


@every_method
def test_only_learned_states_are_differentiated(method):
    scalarizer, state = experienced(method, L)
    traced = _tree.map(
        lambda leaf: leaf.clone().requires_grad_() if leaf.is_floating_point() else leaf, state
    )
    assert scalarizer(L, traced)[0].requires_grad == method.learned


@every_method
def test_random_methods_draw_anew_at_every_call(method):
    scalarizer, state = fresh(method, L, 4)
    seen = set()
    for _ in range(6 if method.random else 0):
        loss, state = scalarizer(L, state)
        seen.add(float(loss))
    assert len(seen) == (6 if method.random else 0)


@every_method
def test_gradient_is_that_of_the_value(method):
    scalarizer, state = fresh(method, L, 4)

    def loss(values):
        return scalarizer(values, state)[0]

    values = L.clone().requires_grad_()
    assert (
        torch.autograd.gradcheck(loss, values, raise_exception=method.differentiable)
        == method.differentiable
    )


@every_method
def test_gradient_is_a_convex_combination_where_claimed(method):
    seen = []
    for values in (L, L.flip(0), 3 * L + 1):
        for scalarizer, state in (fresh(method, values, 4), experienced(method, values)):
            got = gradient(scalarizer, values, state)
            seen.append(bool((got >= 0).all()) and abs(float(got.sum()) - 1) < 1e-9)
    assert all(seen) == method.convex


@every_method
def test_order_of_the_losses_does_not_matter_where_claimed(method):
    order = torch.tensor([2, 0, 3, 1])
    scalarizer, state = fresh(method, L, 4)
    loss, got = scalarizer(L, state)[0], gradient(scalarizer, L, state)
    same = torch.allclose(scalarizer(L[order], state)[0], loss, rtol=1e-9)
    same &= torch.allclose(gradient(scalarizer, L[order], state), got[order], rtol=1e-9)
    assert same == method.equivariant


@every_method
def test_value_is_homogeneous_where_claimed(method):
    scalarizer, state = fresh(method, L, 4)
    loss = float(scalarizer(L, state)[0])
    degree = 1.0 if method.degree is None else method.degree
    same = [
        float(scalarizer(scale * L, state)[0]) == pytest.approx(scale**degree * loss, rel=1e-7)
        for scale in (1e-6, 3.0, 1e6)
    ]
    assert all(same) == (method.degree is not None)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 10.0])
def test_loss_and_gradient_are_finite(method, dtype, scale):
    for m in (1, 2, 5):
        values = (scale * losses(m)).to(dtype)
        scalarizer, state = experienced(method, values)
        loss, _ = scalarizer(values, state)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient(scalarizer, values, state)).all()


@every_method
def test_zero_losses(method):
    zero = torch.zeros(3, dtype=torch.float64)
    scalarizer, state = fresh(method, zero, 3)
    loss, _ = scalarizer(zero, state)
    got = gradient(scalarizer, zero, state)
    assert bool(torch.isfinite(loss) and torch.isfinite(got).all()) == method.finite_at_zero


@every_method
def test_observations_of_another_size_are_an_error(method):
    scalarizer, state = fresh(method, L, 4)
    assert (scalarizer.observe is not None) == bool(method.observes)
    if scalarizer.observe is not None:
        with pytest.raises(ValueError, match="losses"):
            scalarizer.observe(torch.cat([L, L]), state)
