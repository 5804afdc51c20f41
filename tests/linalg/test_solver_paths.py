"""The paths of one method agree: numpy and torch, every transform, every derivative; the census."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, vmap

import torchjd_func as jd
from benchmarks import solvers
from tests.helpers import compiled, weighting
from tests.matrices import matrix
from tests.registry import METHODS, losses_for, run

DIFFERENTIABLE = {
    "upgrad": jd.upgrad,
    "dualproj": jd.dualproj,
    "mgda": jd.mgda,
    "nash_mtl": jd.nash_mtl,
    "fairgrad": lambda: jd.fairgrad(2.0),
    "cagrad": jd.cagrad,
}
every_rule = pytest.mark.parametrize("make", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
GRAMIANS = torch.stack([jac @ jac.mT for jac in (matrix("gaussian", 4, 7, s) for s in range(3))])
# Small linear programs are solved on the CPU.
ON_THE_CPU = ("epo", "pmgda")


@pytest.mark.parametrize("m", solvers.SIZES[:-1])
def test_every_problem_of_the_census_is_solved(m):
    found = solvers.census(m, problems=240)
    assert found.converged == found.solved == 1
    assert found.worst < 1e-8
    assert found.fallback < 1


@pytest.mark.parametrize("kind", ["gaussian", "duplicate", "opposite", "zero", "low_rank"])
@pytest.mark.parametrize("name", METHODS)
def test_numpy_and_torch_agree(name, kind):
    method = METHODS[name]
    m = max(4, method.min_m)
    jac = matrix(kind, m, 9, seed=11)
    want, got = run(method, jac, m), run(method, jac.clone().requires_grad_(), m)
    torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].weighted])
def test_weights_never_wait_for_values(name):
    method = METHODS[name]
    m = max(4, method.min_m)
    rule = method.make(m).weighting
    if rule is None or name.startswith(ON_THE_CPU):
        return
    meta = torch.empty(m, m, device="meta")
    key = (
        jd.random.key(torch.zeros((), dtype=torch.int64, device="meta")) if method.random else None
    )
    losses = losses_for(method, m)
    losses = None if losses is None else losses.to("meta")
    weights, _ = rule(meta, rule.init(meta, key=key), losses=losses)
    assert weights.shape == (m,)
    assert weights.is_meta


@every_rule
def test_derivatives_in_the_gramian(make):
    rule = weighting(make())
    symmetric = GRAMIANS[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: rule(0.5 * (g + g.mT))[0], (symmetric,))


@pytest.mark.parametrize("factory", [jd.upgrad, jd.dualproj])
def test_derivatives_in_the_preference(factory):
    preference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    for gramian in (GRAMIANS[0], GRAMIANS[1].clone().requires_grad_()):
        assert torch.autograd.gradcheck(
            lambda b, g: weighting(factory(b))(0.5 * (g + g.mT))[0], (preference, gramian)
        )


@every_rule
def test_derivatives_under_every_transform(make):
    rule = weighting(make())

    def length(gramian):
        return rule(gramian)[0].square().sum()

    leaf = GRAMIANS.clone().requires_grad_()
    total = torch.stack([length(gramian) for gramian in leaf]).sum()
    want = torch.autograd.grad(total, leaf)[0]
    torch.testing.assert_close(torch.stack([grad(length)(g) for g in GRAMIANS]), want)
    torch.testing.assert_close(vmap(grad(length))(GRAMIANS), want)
    weights, jac = rule(GRAMIANS[0])[0], jacrev(lambda g: rule(g)[0])(GRAMIANS[0])
    torch.testing.assert_close(2 * torch.einsum("i,ijk", weights, jac), want[0])
    fast, counter = compiled(grad(length))
    got = fast(GRAMIANS[0])
    symmetric = 0.5 * (got + got.mT), 0.5 * (want[0] + want[0].mT)
    torch.testing.assert_close(*symmetric)
    assert counter.graphs == 1


@every_rule
def test_graphs_hold_systems_of_derivatives_only_where_something_is_differentiated(make):
    rule, graphs = weighting(make()), []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def weights(gramian):
        return rule(gramian)[0]

    torch.compiler.reset()
    fast = torch.compile(weights, backend=keep, fullgraph=True)
    leaf = GRAMIANS[0].clone().requires_grad_()
    torch.testing.assert_close(fast(GRAMIANS[0]), weights(GRAMIANS[0]))
    got, want = (torch.autograd.grad(f(leaf).square().sum(), leaf)[0] for f in (fast, weights))
    torch.testing.assert_close(got + got.mT, want + want.mT)
    value, differentiable = graphs
    assert any("linalg" in name for name in differentiable)
    assert not any("linalg" in name for name in value)


@every_rule
def test_tangents_are_not_lost(make):
    rule = weighting(make())
    tangent = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
    with forward_ad.dual_level():
        weights = rule(forward_ad.make_dual(GRAMIANS[0], tangent))[0]
        got = forward_ad.unpack_dual(weights).tangent
    step = 1e-6
    high, low = (rule(GRAMIANS[0] + s * tangent)[0] for s in (step, -step))
    torch.testing.assert_close(got, (high - low) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m", [3, 8, 32])
@pytest.mark.parametrize("make", [jd.upgrad, jd.dualproj, jd.mgda])
def test_repeated_rows_are_the_same_eager_and_compiled(make, m):
    rows = matrix("gaussian", m - 2, m, seed=m)
    jac = torch.cat([rows, rows[:1], 2 * rows[1 % len(rows) :][:1]])
    fast, _ = compiled(lambda jac: make()(jac)[0])
    torch.testing.assert_close(fast(jac), make()(jac)[0])
    slope = grad(lambda jac: make()(jac)[0].sum())(jac)
    assert slope.isfinite().all()


@pytest.mark.parametrize("kind", ["gaussian", "duplicate", "opposite", "zero", "integer"])
@pytest.mark.parametrize(("m", "n"), [(64, 40), (96, 48), (96, 24)])
def test_many_problems_with_one_matrix_are_solved_as_each_alone(kind, m, n):
    jac = matrix(kind, m, n, seed=5)
    gramian = jac @ jac.mT
    together = jd.linalg.nnqp(gramian, gramian)
    assert together.converged.all()
    assert solvers.residuals(gramian.expand(m, m, m), gramian, together.value).max() <= 1e-10
    for i in (0, 1, m - 1):
        alone = jd.linalg.nnqp(gramian, gramian[i]).value
        torch.testing.assert_close(
            together.value[i] @ jac, alone @ jac, rtol=0, atol=1e-6 * float(jac.norm(dim=1).max())
        )


@pytest.mark.parametrize("m", [30, 60, 100])
def test_derivatives_where_every_row_is_there_twice(m):
    first = matrix("gaussian", m // 2, 2 * m, seed=m)
    jac, change = torch.cat([first, 2 * first]), torch.cat([first.cos(), 2 * first.cos()])

    def length(jac):
        return jd.upgrad()(jac)[0].square().sum()

    assert jd.linalg.nnqp(jac @ jac.mT, jac @ jac.mT).fallback.all()
    step = 1e-6
    want = (length(jac + step * change) - length(jac - step * change)) / (2 * step)
    torch.testing.assert_close((grad(length)(jac) * change).sum(), want, rtol=1e-5, atol=1e-8)


def test_float32_gramians_of_rows_whose_singular_values_decay_are_solved():
    decay = torch.arange(1, 26) ** -1.5
    jac = matrix("gaussian", 128, 25, seed=0).float() * decay
    gramian = jac @ jac.mT
    solution = jd.linalg.dual_cone_projection(gramian, torch.eye(128))
    assert solution.converged.all()
    directions = solution.value.double() @ jac.double()
    lengths = jac.double().norm(dim=1)
    assert (directions.norm(dim=1) <= 1.001 * lengths).all()
    assert (directions @ jac.double().mT).min() >= -1e-3 * lengths.max() ** 2
