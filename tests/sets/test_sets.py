"""Set-valued methods against loops, finite differences and numbers of their papers."""

import dataclasses
import inspect
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import (
    as_tree,
    assert_same_layout,
    assert_trees_close,
    clone,
    close,
    compiled,
    double,
)
from tests.matrices import A, B, C, matrix
from torchjd_func import _tree
from torchjd_func.sets._hypervolume_gradient import facets, front_ranks, volume

ANGLES = torch.tensor([0.0, math.pi / 4, math.pi / 2], dtype=torch.float64)
QUARTER = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def directions(rule: jd.sets.SetRule, jacs: Tensor, losses: Tensor) -> Tensor:
    """Call once, from a fresh state."""
    return rule(jacs, losses=losses)[0]


def problem(k: int, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw Jacobians and positive losses of `k` models."""
    first, second = jd.random.split(jd.random.key(seed))
    losses = 0.1 + jd.random.uniform(second, (k, m), dtype=torch.float64)
    return jd.random.normal(first, (k, m, n), dtype=torch.float64), losses


def preferences(k: int, m: int, seed: int = 7) -> Tensor:
    """Draw preference vectors."""
    return jd.random.uniform(jd.random.key(seed), (k, m), dtype=torch.float64) + 0.01


RULES = {
    "moo_svgd": lambda k, m: jd.sets.moo_svgd(),
    "moo_svgd[h]": lambda k, m: jd.sets.moo_svgd(0.5),
    "hypervolume_gradient": lambda k, m: jd.sets.hypervolume_gradient(2 * torch.ones(m).double()),
    "stch_set": lambda k, m: jd.sets.stch_set(),
    "pareto_mtl": lambda k, m: jd.sets.pareto_mtl(preferences(k, m)),
    "pareto_mtl[0]": lambda k, m: jd.sets.pareto_mtl(preferences(k, m), n_feasibility_steps=0),
}
each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


# The contract.


@each_rule
@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 2, 3), (3, 3, 2), (5, 4, 6), (3, 1, 2)])
def test_weights_combine_the_gradients(make, shape):
    rule, (jacs, losses) = make(*shape[:2]), problem(*shape)
    weights, state = rule.weighting(jacs @ jacs.mT, losses=losses)
    got, other = rule(jacs, losses=losses)
    own = torch.einsum("im,imn->in", weights, jacs) if weights.ndim == 2 else None
    all_of_them = "ijm,jmn->in"
    close(got, torch.einsum(all_of_them, weights, jacs) if own is None else own, atol=1e-10)
    assert_trees_close(state, other)


@each_rule
def test_a_pytree_is_a_matrix(make):
    jacs, losses = problem(3, 2, 5)
    tree = _tree.stack([as_tree(jac) for jac in jacs])
    want = as_tree(directions(make(3, 2), jacs, losses))
    assert_trees_close(make(3, 2)(tree, losses=losses)[0], want)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_and_state_are_kept_and_nothing_is_changed(make, dtype):
    jacs, losses = (x.to(dtype) for x in problem(4, 3, 5))
    rule, before = make(4, 3), (clone(jacs), clone(losses))
    state = rule.init(jacs)
    got, after = rule(jacs, state, losses=losses)
    assert (got.dtype, got.shape) == (dtype, (4, 5))
    assert_same_layout(after, state)
    assert_trees_close((jacs, losses), before, rtol=0, atol=0)
    assert_trees_close(rule.init(torch.full_like(jacs, torch.nan)), state)
    exact = directions(rule, jacs.double(), losses.double())
    tol = 3e-2 if dtype == torch.float16 else 1e-4
    torch.testing.assert_close(got.double(), exact, rtol=tol, atol=tol)


@each_rule
def test_steps_compile_and_map(make):
    jacs, losses = (
        torch.stack(x) for x in zip(*(problem(4, 3, 5, s) for s in range(3)), strict=True)
    )
    rule = make(4, 3)

    def step(jacs, losses, state):
        return rule(jacs, state, losses=losses)

    state = rule.init(jacs[0])
    want = [step(*args, state) for args in zip(jacs, losses, strict=True)]
    states = () if state == () else type(state)(*(x.expand(3, *x.shape) for x in state))
    in_dims = (0, 0, None if state == () else 0)
    mapped = vmap(step, in_dims)
    for fn in (mapped, compiled(mapped)[0]):
        assert_trees_close(fn(jacs, losses, states), _tree.stack(want), atol=1e-10)
    fast, counter = compiled(step)
    assert_trees_close(fast(jacs[0], losses[0], state), want[0], atol=1e-10)
    fast(jacs[1], losses[1], want[0][1])
    assert counter.graphs == 1


@each_rule
def test_permuted_models_take_permuted_steps(make):
    if make in (RULES["pareto_mtl"], RULES["pareto_mtl[0]"]):
        units = preferences(4, 3)
        pair = [jd.sets.pareto_mtl(u) for u in (units, units.flip(0))]
    else:
        pair = [make(4, 3)] * 2
    jacs, losses = problem(4, 3, 5)
    want = directions(pair[0], jacs, losses).flip(0)
    close(directions(pair[1], jacs.flip(0), losses.flip(0)), want, atol=1e-10)


@each_rule
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-6, 6))
def test_directions_have_the_scale_of_the_gradients(make, seed, exponent):
    jacs, losses = problem(3, 2, 4, seed)
    want = directions(make(3, 2), jacs, losses)
    if make is RULES["moo_svgd"] or make is RULES["moo_svgd[h]"]:
        losses = losses.mean(0).expand(3, 2)  # repulsion scales as well, but sharing does not
        want = directions(make(3, 2), jacs, losses)
    got = directions(make(3, 2), 10.0**exponent * jacs, losses)
    torch.testing.assert_close(got, 10.0**exponent * want, rtol=1e-6, atol=1e-9 * 10.0**exponent)


@each_rule
def test_what_is_not_a_number_is_seen(make):
    jacs, losses = problem(3, 2, 4)
    bad = jacs.clone()
    bad[1, 0, 0] = torch.nan
    assert directions(make(3, 2), bad, losses)[1].isnan().any()
    for value in (torch.nan, torch.inf):
        wrong = losses.clone()
        wrong[1, 0] = value
        assert directions(make(3, 2), jacs, wrong)[1].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_that_diverged_does_not_stop_the_others_of_a_front(value):
    jacs, losses = problem(3, 2, 4)
    wrong = losses.clone()
    wrong[1, 0] = value
    rule, others = jd.sets.hypervolume_gradient(torch.zeros(2)), torch.tensor([0, 2])
    got = directions(rule, jacs, wrong)
    assert got[1].isnan().all()
    assert_trees_close(got[others], directions(rule, jacs[others], losses[others]))


@pytest.mark.parametrize("exponent", [-150, -155, -158])
def test_rows_whose_squares_are_subnormal(exponent):
    jacs, losses = problem(3, 2, 4)
    for rule in (jd.sets.moo_svgd(1.0), jd.sets.pareto_mtl(torch.eye(3, 2).double() + 0.1)):
        got = rule.weighting((10.0**exponent * jacs) @ (10.0**exponent * jacs).mT, losses=losses)[0]
        assert got.isfinite().all()
    gramian = jacs[0] @ jacs[0].T
    tiny = (10.0**exponent * jacs[0]) @ (10.0**exponent * jacs[0]).T
    for fn in (
        lambda g: jd.linalg.min_norm_point(g).value,
        lambda g: jd.linalg.nnqp(g, -g[0]).value,
        lambda g: jd.linalg.dual_cone_projection(g, torch.tensor([1.0, 0.0]).double()).value,
        lambda g: jd.linalg.orthant_root(g).value * g.diagonal().sqrt(),
        jd.metrics.pairwise_cosine,
    ):
        torch.testing.assert_close(fn(tiny), fn(gramian), rtol=1e-4, atol=1e-6)


@each_rule
def test_directions_can_be_differentiated(make):
    rule, (jacs, losses) = make(3, 2), problem(3, 2, 4)
    inputs = jacs.requires_grad_(), losses.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: directions(rule, *args), inputs)


@each_rule
def test_rules_are_printable_picklable_and_frozen(make):
    rule = make(3, 2)
    assert repr(rule).startswith(f"SetRule({rule.name}")
    assert pickle.loads(pickle.dumps(rule)).name == rule.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.name = "another"


@pytest.mark.parametrize("name", jd.sets.__all__)
def test_docstrings_follow_the_template(name):
    doc = inspect.getdoc(getattr(jd.sets, name)) or ""
    if name != "SetRule":
        for section in ("Args:", "Returns:", "Raises:", "References:", "Example:"):
            assert section in doc
    assert list(jd.sets.__all__) == sorted(jd.sets.__all__)


# MOO-SVGD.


def test_moo_svgd_example():
    targets = double([1.0, 0.0], [-1.0, 0.0])
    points = double([0.0, 1.0], [0.5, 0.5], [-0.5, 1.0])
    jacs, losses = vmap(jd.jac_and_value(lambda x: (x - targets).square().sum(1)))(points)
    got = directions(jd.sets.moo_svgd(2.0), jacs, losses)
    want = [[-0.07878127, 0.91675582], [-0.30911599, 0.63201339], [0.55143326, 0.77490629]]
    close(got, want, atol=1e-8)
    shortest = [[0.0, 2.0], [0.0, 1.0], [0.0, 2.0]]
    close(directions(jd.sets.moo_svgd(1e-9), jacs, losses), double(*shortest) / 3)


def svgd_by_loops(jacs: Tensor, losses: Tensor, h: float | None) -> Tensor:
    """Follow the formula one pair of models at a time."""
    k = len(losses)
    squares = [[float((a - b).square().sum()) for b in losses] for a in losses]
    if h is None:
        flat = sorted(itertools.chain(*squares))
        h = (flat[(k * k - 1) // 2] + flat[k * k // 2]) / 2 / math.log(k)
    result = []
    for i in range(k):
        total = torch.zeros_like(jacs[0, 0])
        for j in range(k):
            kernel = math.exp(-squares[i][j] / h)
            total += kernel * jd.mgda()(jacs[j])[0]
            total += -2 / h * kernel * jacs[i].mT @ (losses[i] - losses[j])
        result.append(total / k)
    return torch.stack(result)


@pytest.mark.parametrize("h", [None, 0.3, 10.0])
@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 3, 2), (4, 2, 3), (5, 4, 6)])
def test_moo_svgd_equals_loops(shape, h):
    jacs, losses = problem(*shape)
    rule = jd.sets.moo_svgd(h)
    close(directions(rule, jacs, losses), svgd_by_loops(jacs, losses, h), atol=1e-10)


def test_repulsion_is_half_the_gradient_of_the_sum_of_the_kernel():
    targets = double([1.0, 0.0, 2.0], [-1.0, 0.5, 0.0])
    points = problem(4, 2, 3)[0][:, 0]
    losses_of = vmap(lambda x: (x - targets).square().sum(1))

    def affinity(points):
        losses = losses_of(points)
        return (-(losses[:, None] - losses).square().sum(-1) / 3.0).exp().sum()

    jacs, losses = vmap(jd.jac_and_value(lambda x: (x - targets).square().sum(1)))(points)
    kernel = (-(losses[:, None] - losses).square().sum(-1) / 3.0).exp()
    down = torch.stack([jd.mgda()(jac)[0] for jac in jacs])
    got = directions(jd.sets.moo_svgd(3.0), jacs, losses)
    close(4 * got - kernel @ down, torch.func.grad(affinity)(points) / 2, atol=1e-10)


def test_one_model_follows_mgda_and_coincident_models_do_not_repel():
    jacs, losses = problem(1, 3, 5)
    close(directions(jd.sets.moo_svgd(), jacs, losses)[0], jd.mgda()(jacs[0])[0], atol=1e-12)
    jacs = problem(4, 3, 5)[0]
    down = torch.stack([jd.mgda()(jac)[0] for jac in jacs])
    for h in (None, 1.0):
        got = directions(jd.sets.moo_svgd(h), jacs, losses.expand(4, 3))
        close(got, down.mean(0).expand(4, 5), atol=1e-12)


def test_most_models_coincide():
    jacs, losses = problem(4, 2, 3)
    losses = losses[[0, 0, 0, 1]]  # the median distance is 0
    down = torch.stack([jd.mgda()(jac)[0] for jac in jacs])
    want = torch.cat([down[:3].mean(0).expand(3, 3) * 3 / 4, down[3:] / 4])
    close(directions(jd.sets.moo_svgd(), jacs, losses), want, atol=1e-12)


def test_the_bandwidth_can_be_swept():
    jacs, losses = problem(3, 2, 4)
    sweep = double(0.1, 1.0)
    got = vmap(lambda h: directions(jd.sets.moo_svgd(h), jacs, losses))(sweep)
    want = [directions(jd.sets.moo_svgd(float(h)), jacs, losses) for h in sweep]
    close(got, torch.stack(want), atol=1e-12)


# Hypervolume.


def counted(points: Tensor, corner: Tensor) -> float:
    """Return the hypervolume by inclusion and exclusion."""
    boxes = [point for point in points if bool((point < corner).all())]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, size):
            sides = corner - torch.stack(some).amax(0)
            total -= (-1) ** size * float(sides.prod())
    return total


def fronts_by_peeling(losses: Tensor) -> list[int]:
    """Take what nothing dominates away, again and again."""
    left, rank, front = list(range(len(losses))), [0] * len(losses), 0
    while left:
        free = [
            i
            for i in left
            if not any(
                (losses[j] <= losses[i]).all() and (losses[j] < losses[i]).any() for j in left
            )
        ]
        for i in free:
            rank[i] = front
        left, front = [i for i in left if i not in free], front + 1
    return rank


def slopes(losses: Tensor, corner: Tensor, step: float = 1e-6) -> Tensor:
    """Return minus the derivative of the volume of each front, by finite differences."""
    rank, result = fronts_by_peeling(losses), torch.zeros_like(losses)
    for i, axis in itertools.product(range(len(losses)), range(losses.shape[1])):
        mates = [j for j in range(len(losses)) if rank[j] == rank[i]]
        ends = []
        for sign in (-1, 1):
            moved = losses.clone()
            moved[i, axis] += sign * step
            ends.append(counted(moved[mates], corner))
        result[i, axis] = (ends[0] - ends[1]) / (2 * step)
    return result


def omega(losses: Tensor, corner: Tensor, **options) -> Tensor:
    """Return the weights of `hypervolume_gradient`."""
    rule = jd.sets.hypervolume_gradient(corner, **options)
    m = losses.shape[1]
    return rule.weighting(torch.zeros(len(losses), m, m, dtype=losses.dtype), losses=losses)[0]


def test_hypervolume_gradient_examples():
    two, five = double([1.0, 4.0], [2.0, 2.0], [4.0, 1.0]), double(5.0, 5.0)
    close(omega(two, five, normalize=False), [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]])
    close(omega(two, five), torch.full((3, 2), 0.5).double().sqrt())
    three = double([1.0, 2.0, 3.0], [2.0, 1.0, 2.0], [3.0, 3.0, 1.0])
    want = [[2.0, 1.0, 2.0], [4.0, 4.0, 5.0], [1.0, 1.0, 1.0]]
    close(omega(three, double(4.0, 4.0, 4.0), normalize=False), want)
    assert counted(two, five) == 11
    assert counted(three, double(4.0, 4.0, 4.0)) == 15
    dominated = torch.cat([two, double([3.0, 3.0])])
    close(omega(dominated, five, normalize=False)[3], [2.0, 2.0])
    close(omega(dominated, five, normalize=False)[:3], omega(two, five, normalize=False))


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 6), m=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_facets_equal_finite_differences(k, m, seed):
    losses, corner = problem(k, m, 1, seed)[1], torch.full((m,), 1.05, dtype=torch.float64)
    apart = [(a - b).abs().min() for a, b in itertools.combinations([*losses, corner], 2)]
    if min(apart) > 1e-5:
        close(facets(losses, corner), slopes(losses, corner), atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(k=st.integers(1, 6), d=st.integers(1, 4), seed=st.integers(0, 10**6), ties=st.booleans())
def test_volume_and_fronts_equal_counting(k, d, seed, ties):
    points = problem(k, d, 1, seed)[1]
    points = (3 * points).round() / 3 if ties else points
    assert front_ranks(points).tolist() == fronts_by_peeling(points)
    corner = torch.full((d,), 1.5, dtype=torch.float64)
    close(volume(corner - points), counted(points, corner), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 7), m=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_facets_of_a_front_fill_the_shadow_of_the_front(k, m, seed):
    losses = problem(k, m, 1, seed)[1]
    losses = losses / losses.norm(dim=1, keepdim=True)  # one front
    corner = torch.full((m,), 1.2, dtype=torch.float64)
    assert front_ranks(losses).max() == 0
    for axis in range(m):
        rest = [other for other in range(m) if other != axis]
        shadow = counted(losses[:, rest], corner[rest])
        close(facets(losses, corner)[:, axis].sum(), shadow, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), m=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_weights_are_units_not_negative_and_a_small_step_gains_volume(k, m, seed):
    losses, corner = problem(k, m, 1, seed)[1], torch.full((m,), 1.3, dtype=torch.float64)
    weights = omega(losses, corner)
    assert (weights >= 0).all()
    close(weights.norm(dim=1), torch.ones(k), atol=1e-12)
    assert counted(losses - 1e-4 * weights, corner) > counted(losses, corner)


def test_edges_of_the_hypervolume():
    corner = double(5.0, 5.0)
    once, twice = double([1.0, 4.0], [2.0, 2.0]), double([1.0, 4.0], [2.0, 2.0], [2.0, 2.0])
    want = omega(once, corner, normalize=False)
    close(omega(twice, corner, normalize=False), want[[0, 1, 1]])
    outside = double([1.0, 4.0], [0.5, 6.0], [5.0, 1.0])
    got = omega(outside, corner, slack=None)
    close(got, [[4 / 17**0.5, 1 / 17**0.5][::-1], [0.0, 0.0], [0.0, 0.0]])
    raised = double(5.5, 6.6)
    close(omega(outside, corner), omega(outside, raised, slack=None))
    below = -double([1.0, 4.0], [2.0, 2.0])
    close(omega(below, double(-9.0, -9.0)), omega(below, double(-0.9, -1.8), slack=None))
    tied = double([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])  # along axis 0, where their squares overlap
    close(omega(tied, double(4.0, 4.0, 4.0), normalize=False)[:, 0], [1.0, 1.0])
    single = omega(double([2.0], [1.0], [1.0]), double(3.0))
    close(single, [[1.0], [1.0], [1.0]])


def test_hypervolume_does_not_read_gramians():
    jacs, losses = problem(4, 3, 5)
    rule = jd.sets.hypervolume_gradient(double(2.0, 2.0, 2.0))
    weights, _ = rule.weighting(torch.full((4, 3, 3), torch.nan), losses=losses)
    close(weights, rule.weighting(jacs @ jacs.mT, losses=losses)[0].float())


def test_the_reference_can_be_swept():
    losses = problem(4, 2, 1)[1]
    sweep = double([1.5, 1.5], [2.0, 9.0])
    want = [omega(losses, corner) for corner in sweep]
    close(vmap(lambda corner: omega(losses, corner))(sweep), torch.stack(want), atol=1e-12)


# Pareto MTL.


def test_pareto_mtl_examples():
    gramians = (A @ A.mT).expand(3, 2, 2)
    losses = double([1.0, 2.0]).expand(3, 2)
    first, state = jd.sets.pareto_mtl(QUARTER).weighting(gramians, losses=losses)
    second, _ = jd.sets.pareto_mtl(QUARTER, n_feasibility_steps=0).weighting(
        gramians, losses=losses
    )
    close(first[0], [-0.29289322, 0.70710678], atol=1e-8)
    close(A.mT @ first[0], [5.41421356, 0.41421356, 0.41421356], atol=1e-8)
    close(second[0], [0.41414141, 0.29292929], atol=1e-8)
    close(A.mT @ second[0], [0.10101010, 0.70707071, 0.70707071], atol=1e-8)
    close(first[1], [0.6, 0.4], atol=1e-8)
    close(second[1], [0.6, 0.4], atol=1e-8)
    close(second[2], [0.40569469, 0.25821682], atol=1e-8)
    assert state.descending.tolist() == [False, True, False]
    assert int(state.step) == 1


def pareto_by_hand(jac: Tensor, losses: Tensor, units: Tensor, i: int, stage: int) -> Tensor:
    """Stack the rows that count, and find their shortest combination."""
    active = [u - units[i] for u in units if float((u - units[i]) @ losses) > 0]
    rows = [*(torch.eye(len(losses)).double() if stage == 2 or not active else []), *active]
    return jd.mgda()(torch.stack(rows) @ jac)[0]


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 5), m=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_pareto_mtl_equals_one_model_at_a_time(k, m, n, seed):
    jacs, losses = problem(k, m, n, seed)
    units = preferences(k, m, seed)
    units = units / units.norm(dim=1, keepdim=True)
    for stage, budget in ((1, 1), (2, 0)):
        rule = jd.sets.pareto_mtl(3 * units, n_feasibility_steps=budget)
        got = directions(rule, jacs, losses)
        want = [pareto_by_hand(jacs[i], losses[i], units, i, stage) for i in range(k)]
        # The length is unique to the root of rounding where the minimum is zero.
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("jac", [B, C, matrix("duplicate", 3, 4), matrix("zero", 3, 4)])
def test_the_second_stage_lowers_losses_and_constraints(jac):
    units = torch.eye(3, dtype=torch.float64)
    losses = double([1.0, 2.0, 3.0]).expand(3, 3)
    rule = jd.sets.pareto_mtl(units, n_feasibility_steps=0)
    got = directions(rule, jac.expand(3, *jac.shape), losses)
    for i, direction in enumerate(got):
        active = [u - units[i] for u in units if float((u - units[i]) @ losses[0]) > 0]
        rows = torch.cat([jac, *(row[None] @ jac for row in active)])
        assert (rows @ direction >= direction.square().sum() - 1e-9).all()


def test_stages_begin_one_model_at_a_time_and_do_not_return():
    units = double([1.0, 0.0], [0.0, 1.0])
    rule, jacs = jd.sets.pareto_mtl(units, n_feasibility_steps=3), problem(2, 2, 3)[0]
    outside, inside = double([1.0, 2.0], [1.0, 2.0]), double([2.0, 1.0], [1.0, 2.0])
    state = rule.init(jacs)
    seen = []
    for losses in (outside, outside, outside, outside):
        _, state = rule(jacs, state, losses=losses)
        seen.append(state.descending.tolist())
    assert seen == [[False, True]] * 3 + [[True, True]]
    _, state = rule(jacs, losses=inside)
    assert rule(jacs, state, losses=outside)[1].descending.tolist() == [True, True]


def test_a_model_that_diverged_begins_no_stage():
    rule = jd.sets.pareto_mtl(double(0.1, 0.9, 0.9, 0.1).reshape(2, 2))
    jacs, losses = problem(2, 2, 4)[0], double(5.0, 0.1, 0.1, 5.0).reshape(2, 2)
    _, state = rule(jacs, losses=losses)
    wrong = losses * double(torch.nan, 1.0).unsqueeze(1)
    assert torch.equal(rule(jacs, state, losses=wrong)[1].descending, state.descending)


def test_equal_preferences_and_margins():
    jacs, losses = problem(2, 2, 3)
    same = jd.sets.pareto_mtl(double([1.0, 1.0], [2.0, 2.0]), margin=0.5)
    want = torch.stack([jd.mgda()(jac)[0] for jac in jacs])
    close(directions(same, jacs, losses), want, atol=1e-10)
    near = double([1.0, 0.9], [0.9, 1.0])
    units, gramians = double([1.0, 0.0], [0.0, 1.0]), jacs @ jacs.mT
    free = jd.sets.pareto_mtl(units).weighting(gramians, losses=near)[1]
    held = jd.sets.pareto_mtl(units, margin=0.2).weighting(gramians, losses=near)[1]
    assert free.descending.all()
    assert not held.descending.any()


def test_preferences_and_budget_can_be_swept():
    jacs, losses = problem(3, 2, 4)
    sweep = torch.stack([preferences(3, 2, seed) for seed in range(3)])
    budgets = torch.tensor([0, 1, 5])

    def run(units, budget):
        return directions(jd.sets.pareto_mtl(units, n_feasibility_steps=budget), jacs, losses)

    want = [run(units, budget) for units, budget in zip(sweep, budgets, strict=True)]
    close(vmap(run)(sweep, budgets), torch.stack(want), atol=1e-10)


# Sets cover the front.


TARGETS = double([1.0, 0.0], [-1.0, 0.0])


FAN = math.pi / 2 * torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
SPREADING = [
    (jd.sets.hypervolume_gradient(double(6.0, 6.0)), 25.0, 0.05),
    (jd.sets.pareto_mtl(torch.stack([FAN.cos(), FAN.sin()], 1)), 25.0, 0.05),
    (jd.sets.moo_svgd(), 25.0, 0.25),  # repelled at the ends of the front, and off it
]


@pytest.mark.parametrize(
    ("rule", "least", "off"), SPREADING, ids=[rule.name for rule, *_ in SPREADING]
)
def test_sets_spread_over_the_front(rule, least, off):
    points = 0.1 * problem(6, 1, 2)[0][:, 0] + double(0.0, 1.0)
    measure = vmap(jd.jac_and_value(lambda x: (x - TARGETS).square().sum(1)))
    jacs, losses = measure(points)
    state, volumes = rule.init(jacs), []
    for _ in range(300):
        volumes.append(jd.metrics.hypervolume(losses, double(6.0, 6.0)))
        moves, state = rule(jacs, state, losses=losses)
        points = points - 0.05 * moves
        jacs, losses = measure(points)
    assert volumes[0] < 20
    assert volumes[-1] > least
    assert points[:, 1].abs().max() < off


# Errors.


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: jd.sets.moo_svgd(0.0), ValueError, "`bandwidth` must be in"),
        (lambda: jd.sets.hypervolume_gradient(double(1.0), slack=1.0), ValueError, "`slack`"),
        (lambda: jd.sets.hypervolume_gradient(torch.ones(1, 2)), ValueError, "`reference` must be"),
        (lambda: jd.sets.pareto_mtl(torch.ones(2)), ValueError, "`preferences` must be a tensor"),
        (lambda: jd.sets.pareto_mtl(QUARTER.long()), TypeError, "floating-point"),
        (lambda: jd.sets.pareto_mtl(QUARTER, margin=-1.0), ValueError, "`margin` must be in"),
        (lambda: jd.sets.pareto_mtl(QUARTER, n_feasibility_steps=-1), ValueError, "n_feasibility"),
    ],
)
def test_hyper_parameters_out_of_range_are_errors(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


GRAM, LOSSES = torch.ones(3, 2, 2), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda r: r({}, losses=LOSSES), ValueError, "hold at least one tensor"),
        (lambda r: r(torch.ones(3), losses=LOSSES), ValueError, "leading dimensions"),
        (
            lambda r: r({"a": torch.ones(3, 2), "b": torch.ones(2, 2)}, losses=LOSSES),
            ValueError,
            "at 'b'",
        ),
        (lambda r: r(torch.ones(3, 2).long(), losses=LOSSES), TypeError, "floating-point"),
        (lambda r: r.weighting({"a": GRAM}, losses=LOSSES), TypeError, "be a tensor"),
        (lambda r: r.weighting(GRAM[0], losses=LOSSES), ValueError, r"shape \(k, m, m\)"),
        (lambda r: r.weighting(GRAM.long(), losses=LOSSES), TypeError, "floating-point"),
        (lambda r: r.weighting(GRAM, losses=LOSSES[0]), ValueError, r"shape \(3, 2\)"),
        (lambda r: r.weighting(GRAM, losses=None), TypeError, "the losses given to"),
        (lambda r: r.weighting(GRAM, torch.ones(1), losses=LOSSES), ValueError, "`state`"),
    ],
)
@each_rule
def test_what_does_not_fit_is_an_error(make, call, kind, match):
    with pytest.raises(kind, match=match):
        call(make(3, 2))


def test_sizes_of_hyper_parameters_are_errors():
    with pytest.raises(ValueError, match="`reference` must have one entry"):
        jd.sets.hypervolume_gradient(double(1.0)).weighting(GRAM, losses=LOSSES)
    rule = jd.sets.pareto_mtl(torch.eye(2))
    with pytest.raises(ValueError, match=r"`preferences` must have shape \(3, 2\)"):
        rule.weighting(GRAM, losses=LOSSES)
    state = rule.init(torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match=r"`state.descending` of `pareto_mtl`"):
        rule.weighting(GRAM, state, losses=LOSSES)


def test_stch_set_is_the_gradient_of_its_value():
    _, losses = problem(3, 5, 4)
    shares, ideal = preferences(1, 5)[0], preferences(1, 5, 3)[0]

    def value(losses):
        """A smooth maximum of smooth minima, as in the paper."""
        least = -0.2 * (-losses / 0.2).exp().sum(0).log()
        return 0.3 * (shares * (least - ideal) / 0.3).exp().sum().log()

    rule = jd.sets.stch_set(0.3, preference=shares, reference=ideal, mu_set=0.2)
    got = rule.weighting(torch.zeros(3, 5, 5, dtype=torch.float64), losses=losses)[0]
    close(got, torch.func.grad(value)(losses), 1e-12)


def test_stch_set_of_one_model_is_stch():
    _, losses = problem(1, 4, 3)
    want = torch.func.grad(lambda x: jd.scalarizers.stch(0.5)(x)[0])(losses[0])
    gramians = torch.zeros(1, 4, 4, dtype=torch.float64)
    close(jd.sets.stch_set(0.5).weighting(gramians, losses=losses)[0][0], want, 1e-12)


def test_stch_set_gives_each_objective_to_the_best_model():
    losses = double([0.1, 5.0, 0.2, 7.0], [6.0, 0.3, 8.0, 0.1])
    gramians = torch.zeros(2, 4, 4, dtype=torch.float64)
    weights = jd.sets.stch_set(0.05).weighting(gramians, losses=losses)[0]
    assert ((weights > 1e-9) == (losses < 1)).all()
