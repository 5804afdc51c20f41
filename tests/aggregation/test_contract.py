"""What every method promises, whatever it computes."""

import pytest
import torch

import torchjd_func as jd
from tests.helpers import as_matrix, as_tree, assert_same_layout, assert_trees_close, clone
from tests.matrices import A, B, matrix
from tests.registry import METHODS, Method, fresh, key_for, losses_for, run
from torchjd_func import _tree

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def sample(method: Method, m: int = 3, n: int = 5) -> torch.Tensor:
    """Return a matrix that conflicts, of an allowed size."""
    return matrix("gaussian", max(m, method.min_m), n, seed=3)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_in_is_dtype_out(method, dtype):
    jac = sample(method)
    m = len(jac)
    got = run(method, as_tree(jac.to(dtype)), m)
    assert_same_layout(got, _tree.map(lambda leaf: leaf[0], as_tree(jac.to(dtype))))
    rounded = as_matrix(run(method, as_tree(jac.to(dtype).to(torch.float64)), m))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    scale = float(rounded.abs().max())
    torch.testing.assert_close(
        as_matrix(got).double(), rounded, rtol=tolerance, atol=tolerance * scale
    )


@every_method
def test_pytree_equals_matrix(method):
    jac = sample(method)
    assert_trees_close(as_matrix(run(method, as_tree(jac), len(jac))), run(method, jac, len(jac)))


@every_method
@pytest.mark.parametrize("route", ["jacobian", "product"])
def test_gramian_route_equals_jacobian_route(method, route):
    jac = sample(method)
    m = len(jac)
    aggregator, state = fresh(method, jac, m)
    losses = losses_for(method, m)
    offset = torch.zeros(m, dtype=jac.dtype) if losses is None else losses

    def objective(x):
        return jac @ x + offset

    step = jd.grad(objective, aggregator, route=route)
    point = torch.zeros(jac.shape[1], dtype=jac.dtype)
    got, got_state = state, state
    want_state = state
    for _ in range(3):
        got, got_state = step(got_state, point)
        want, want_state = aggregator(jac, want_state, losses=offset)
        assert_trees_close(got, want)
        assert_trees_close(got_state, want_state)
    if aggregator.weighting is not None:
        weights, _ = aggregator.weighting(jac @ jac.mT, state, losses=offset)
        first, _ = aggregator(jac, state, losses=offset)
        assert_trees_close(jac.mT @ weights, first)


@every_method
def test_state_keeps_structure_shapes_and_dtypes(method):
    jac = as_tree(sample(method))
    m = len(sample(method))
    aggregator, state = fresh(method, jac, m)
    later = state
    for _ in range(3):
        _, later = aggregator(jac, later, losses=losses_for(method, m))
    assert_same_layout(later, state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in _tree.leaves(state))


@every_method
def test_nothing_is_mutated(method):
    jac = as_tree(sample(method))
    m = len(sample(method))
    aggregator, state = fresh(method, jac, m)
    losses = losses_for(method, m)
    before = clone((jac, state, losses)), torch.get_rng_state()
    _, later = aggregator(jac, state, losses=losses)
    aggregator(jac, later, losses=losses)
    assert_trees_close((jac, state, losses), before[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before[1])


@every_method
def test_same_input_gives_same_output(method):
    jac = sample(method)
    assert torch.equal(run(method, jac, len(jac)), run(method, jac, len(jac)))


@every_method
def test_init_reads_shapes_only(method):
    jac = sample(method)
    aggregator = method.make(len(jac))
    key = key_for(method)
    assert_trees_close(
        aggregator.init(torch.full_like(jac, torch.nan), key=key), aggregator.init(jac, key=key)
    )


@every_method
def test_init_state_from_objective_equals_init(method):
    jac = sample(method)
    aggregator, state = fresh(method, jac, len(jac))
    point = torch.zeros(jac.shape[1], dtype=jac.dtype)
    derived = jd.init_state(aggregator, lambda x: jac @ x, point, key=key_for(method))
    assert_trees_close(derived, state)


@every_method
def test_zero_matrix_gives_zero(method):
    m = max(3, method.min_m)
    zero = torch.zeros(m, 4, dtype=torch.float64)
    assert torch.equal(run(method, zero, m), torch.zeros(4, dtype=torch.float64))


@every_method
def test_single_objective_keeps_its_direction(method):
    if method.min_m > 1:
        with pytest.raises(ValueError, match="objective"):
            run(method, A[:1], 1)
        return
    got = run(method, A[:1], 1)
    assert torch.isfinite(got).all()
    if not method.keeps_direction:
        assert (got * A[0] > 0).all()
        return
    cosine = torch.nn.functional.cosine_similarity(got, A[0], dim=0)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-9, atol=0)


@every_method
def test_state_of_another_size_is_an_error(method):
    jac = sample(method)
    m = len(jac)
    aggregator, state = fresh(method, jac, m)
    if not [leaf for leaf in _tree.leaves(state) if leaf.ndim and leaf.dtype.is_floating_point]:
        with pytest.raises(ValueError, match="state"):
            aggregator(jac, (torch.zeros(m),), losses=losses_for(method, m))
        return
    larger = torch.cat([jac, jac])
    with pytest.raises(ValueError, match="state"):
        method.make(2 * m)(larger, state, losses=losses_for(method, 2 * m))


@every_method
def test_random_methods_need_a_key(method):
    aggregator = method.make(max(3, method.min_m))
    jac = sample(method)
    if not method.random:
        aggregator.init(jac)
        return
    with pytest.raises(ValueError, match=r"jd\.random\.key"):
        aggregator.init(jac)


@every_method
def test_methods_that_need_losses_say_so(method):
    jac = sample(method)
    m = len(jac)
    aggregator, state = fresh(method, jac, m)
    if not method.needs_losses:
        aggregator(jac, state)
        return
    with pytest.raises(ValueError, match="losses"):
        aggregator(jac, state)


@every_method
def test_repr_is_one_line(method):
    aggregator = method.make(max(3, method.min_m))
    for rule in (aggregator, aggregator.weighting or aggregator):
        assert repr(rule).startswith(f"{type(rule).__name__}({rule.name}")
        assert "\n" not in repr(rule)


def test_rows_are_counted_in_leaf_order():
    losses = {"b": lambda x: x.sum(), "a": lambda x: x.prod()}
    x = torch.tensor([2.0, 3.0])
    got = jd.jac(lambda x: {name: fn(x) for name, fn in losses.items()})(x)
    assert torch.equal(got, torch.tensor([[3.0, 2.0], [1.0, 1.0]]))


def test_gramian_accumulates_in_float32_or_better():
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = B[0].to(dtype)
        assert jd.gramian(lambda x: B.to(x.dtype) @ x)(x).dtype == want
