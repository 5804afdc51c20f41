"""What every scalarizer promises, whatever it computes."""

import pytest
import torch

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, clone
from tests.scalarizer_registry import (
    METHODS,
    L,
    affine,
    experienced,
    exported,
    fresh,
    gradient,
    key_for,
    losses,
    observe,
)
from torchjd_func import _tree

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def test_every_exported_scalarizer_is_listed():
    assert {exported(name) for name in METHODS} == set(jd.scalarizers.__all__)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_in_is_dtype_out(method, dtype):
    values = L.to(dtype)
    scalarizer, state = fresh(method, values, 4)
    loss, later = scalarizer(values, state)
    got = gradient(scalarizer, values, state)
    assert (loss.shape, loss.dtype, got.dtype) == ((), dtype, dtype)
    assert_same_layout(later, state)
    exact = values.double()
    want_loss, _ = scalarizer(exact, state)
    want = gradient(scalarizer, exact, state)
    tolerance = {torch.float64: 0.0, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.double(), want_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_is_kept_in_float32_or_better(method, dtype):
    _, state = fresh(method, L.to(dtype), 4)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    floating = [leaf for leaf in _tree.leaves(state) if leaf.is_floating_point()]
    assert all(leaf.dtype == want for leaf in floating)


@every_method
def test_loss_is_not_computed_in_low_precision(method):
    values = L.to(torch.bfloat16)
    scalarizer, state = fresh(method, values, 4)
    wide, _ = scalarizer(values.float(), state)
    assert torch.equal(scalarizer(values, state)[0], wide.to(torch.bfloat16))


@every_method
def test_pytree_equals_vector(method):
    tree = {"z": L[3], "a": (L[:2].reshape(1, 2), None), "b": [L[2:3]]}
    scalarizer, state = fresh(method, tree, 4)
    vector_state = scalarizer.init(L, key=key_for(method))
    assert_trees_close(scalarizer(tree, state), scalarizer(L, vector_state), rtol=0, atol=0)
    del tree["a"]
    tree["c"] = L[:2].reshape(1, 2)
    order = torch.tensor([2, 0, 1, 3])  # names are sorted
    got = gradient(scalarizer, tree, state)
    assert_trees_close(_tree.ravel(got), gradient(scalarizer, L[order], vector_state))


@every_method
def test_state_keeps_structure_shapes_and_dtypes(method):
    _, start = fresh(method, L, 4)
    _, later = experienced(method, L)
    assert_same_layout(later, start)
    assert all(isinstance(leaf, torch.Tensor) for leaf in _tree.leaves(start))


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
def test_nothing_is_mutated(method):
    scalarizer, state = experienced(method, L)
    before = clone((L, state)), torch.get_rng_state()
    _, later = scalarizer(L, state)
    observe(method, scalarizer, L, later)
    gradient(scalarizer, L, state)
    assert_trees_close((L, state), before[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before[1])
    assert_trees_close(scalarizer(L, state), scalarizer(L, state), rtol=0, atol=0)


@every_method
def test_random_methods_draw_anew_at_every_call(method):
    scalarizer, state = fresh(method, L, 4)
    seen = set()
    for _ in range(6 if method.random else 0):
        loss, state = scalarizer(L, state)
        seen.add(float(loss))
    assert len(seen) == (6 if method.random else 0)


@every_method
def test_init_reads_shapes_only(method):
    scalarizer, state = fresh(method, L, 4)
    nothing = torch.full_like(L, torch.nan)
    assert_trees_close(scalarizer.init(nothing, key=key_for(method)), state, rtol=0, atol=0)
    point = torch.zeros(3, dtype=torch.float64)
    derived = jd.init_state(scalarizer, affine, point, key=key_for(method))
    assert_trees_close(derived, state, rtol=0, atol=0)


@every_method
def test_no_state_is_a_fresh_state(method):
    scalarizer = method.make(4)
    if method.random:
        with pytest.raises(ValueError, match=r"jd\.random\.key"):
            scalarizer(L)
        with pytest.raises(ValueError, match=r"jd\.random\.key"):
            scalarizer.init(L)
        return
    assert_trees_close(scalarizer(L), scalarizer(L, scalarizer.init(L)), rtol=0, atol=0)


@every_method
def test_gradient_is_that_of_the_value(method):
    scalarizer, state = fresh(method, L, 4)

    def loss(values):
        return scalarizer(values, state)[0]

    values = L.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, values, raise_exception=method.exact) == method.exact


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
def test_state_of_another_size_is_an_error(method):
    scalarizer, state = fresh(method, L, 4)
    if method.random:
        return  # a key serves any number of losses
    if not _tree.leaves(state):
        with pytest.raises(ValueError, match="state"):
            scalarizer(L, (torch.zeros(4),))
        return
    double = method.make(8)
    with pytest.raises(ValueError, match="state"):
        double(torch.cat([L, L]), state)


@every_method
def test_observations_of_another_size_are_an_error(method):
    scalarizer, state = fresh(method, L, 4)
    assert (scalarizer.observe is not None) == bool(method.observes)
    if scalarizer.observe is not None:
        with pytest.raises(ValueError, match="losses"):
            scalarizer.observe(torch.cat([L, L]), state)


@every_method
def test_repr_is_one_line(method):
    scalarizer = method.make(4)
    assert repr(scalarizer).startswith(f"Scalarizer({scalarizer.name}")
    assert "\n" not in repr(scalarizer)
