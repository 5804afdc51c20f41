"""Golden numbers, identities and parity of MoDo and SDMGrad, and options of all solver methods."""

import pytest
import torch
import torchjd.aggregation as peer
from hypothesis import given, settings
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import compiled
from tests.matrices import A2, A, B, jacobians, matrix
from tests.values import close, rows, sequence, weights_of


def test_modo_values():
    found = sequence(jd.modo(0.01, 0.1), [A @ A.mT] * 3)
    want = [[0.55, 0.45], [0.57495, 0.42505], [0.58740005, 0.41259995]]
    for weights, expected in zip(found, want, strict=True):
        close(weights, expected, 8)
    found = sequence(jd.modo(0.01, 0.1), [A @ A2.mT] * 3)
    want = [[0.55, 0.45], [0.57995, 0.42005], [0.59789005, 0.40210995]]
    for weights, expected in zip(found, want, strict=True):
        close(weights, expected, 8)
    close(0.5 * (A + A2).mT @ found[0], [0.55, 0.775, 1.275], 12)
    found = sequence(jd.modo(), [A @ A.mT] * 3)
    assert [weights.tolist() for weights in found] == [[1, 0], [0, 1], [1, 0]]


def cross_gramians(m: int = 3, count: int = 5) -> list[Tensor]:
    """Draw products of the Jacobians of two batches, not symmetric."""
    pairs = [(matrix("gaussian", m, 6, k), matrix("gaussian", m, 6, k + 99)) for k in range(count)]
    return [first @ (0.7 * first + 0.3 * second).mT for first, second in pairs]


def test_modo_agrees_with_the_peer_on_cross_gramians():
    theirs = peer.MoDoWeighting(gamma=0.03, rho=0.2)
    statistics = cross_gramians()
    for got, statistic in zip(sequence(jd.modo(0.03, 0.2), statistics), statistics, strict=True):
        close(got, theirs(statistic), 10)


@pytest.mark.parametrize("jac", [A, B])
def test_modo_converges_to_mgda(jac):
    found = sequence(jd.modo(0.01, 0.0), [jac @ jac.mT] * 3000)
    close(found[-1], weights_of(jd.mgda(), jac))
    ridge = sequence(jd.modo(0.01, 0.1), [A @ A.mT] * 3000)
    close(ridge[-1], [0.59980, 0.40020], 5)


@pytest.mark.parametrize(
    ("lambda_", "jac", "want"),
    [
        (0.3, A, [0.6, 0.4]),
        (10.0, A, [0.54545455, 0.45454545]),
        (0.3, B, [0.65714286, 0.2, 0.14285714]),
        (3.0, B, [0.5, 0.25, 0.25]),
    ],
)
def test_sdmgrad_values(lambda_, jac, want):
    close(jd.sdmgrad(lambda_)(jac @ jac.mT)[0], want, 8)
    slow = jd.sdmgrad(lambda_, solver="reference", lr=0.1, momentum=0.0, n_iter=2000)
    close(slow(jac @ jac.mT)[0], want, 6)
    close(jd.sdmgrad(lambda_, solver="pgd", n_iter=5000)(jac @ jac.mT)[0], want, 6)


def test_sdmgrad_state_holds_the_unmixed_weights():
    _, state = jd.sdmgrad(0.3)(B @ B.mT)
    close(state.weights, [0.75428571, 0.16, 0.08571429], 8)
    step = jd.sdmgrad(0.3, solver="reference", lr=1.0, momentum=0.0, n_iter=1)
    weights, state = step(A @ A2.mT)
    close(state.weights, [0.79171621, 0.20828379], 8)
    close(weights, [0.72439709, 0.27560291], 8)


@pytest.mark.parametrize("preference", [None, [0.2, 0.5, 0.3]])
def test_sdmgrad_reference_agrees_with_the_peer_on_cross_gramians(preference):
    target = None if preference is None else torch.tensor(preference, dtype=torch.float64)
    theirs = peer.SDMGradWeighting(pref_vector=target)
    statistics = cross_gramians()
    found = sequence(jd.sdmgrad(preference=target, solver="reference"), statistics)
    for got, statistic in zip(found, statistics, strict=True):
        close(got, theirs(statistic), 10)


def test_the_peer_bounces_and_the_exact_solver_does_not():
    close(peer.SDMGradWeighting()(A @ A.mT), [0.115385, 0.884615], 6)
    found = sequence(jd.sdmgrad(), [A @ A.mT] * 3)
    for weights in found:
        close(weights, [0.6, 0.4], 8)


@given(jacobians(min_n=6, kinds=("gaussian",)))
@settings(deadline=None, max_examples=20)
def test_sdmgrad_is_between_mgda_and_its_target(jac):
    gramian = jac @ jac.mT
    close(jd.sdmgrad(0.0)(gramian)[0], weights_of(jd.mgda(), jac))
    target = torch.linspace(1, 2, len(jac), dtype=torch.float64)
    target = target / target.sum()
    close(jd.sdmgrad(1e8, preference=target)(gramian)[0], target)
    for scale in (1e-6, 1e6):
        close(jd.sdmgrad()(scale**2 * gramian)[0], jd.sdmgrad()(gramian)[0])


def test_sdmgrad_pgd_reaches_a_stationary_point_of_a_cross_gramian():
    for statistic in cross_gramians():
        for lambda_ in (0.0, 0.5):
            weighting = jd.sdmgrad(lambda_, solver="pgd", n_iter=20000)
            _, state = weighting(statistic)
            slope = statistic @ (state.weights + lambda_ / 3)
            # No direction in the simplex is downhill.
            assert float(slope @ state.weights - slope.min()) < 1e-6


def test_sdmgrad_exact_takes_the_positive_part_of_a_cross_gramian():
    indefinite = rows([1.0, 3.0], [2.0, -0.5])
    values, vectors = torch.linalg.eigh(0.5 * (indefinite + indefinite.mT))
    root = vectors * values.clamp(min=0).sqrt()
    shifted = root + 0.3 * root.mean(0)
    want = (weights_of(jd.mgda(), shifted) + 0.15) / 1.3
    close(jd.sdmgrad(0.3)(indefinite)[0], want, 9)


@pytest.mark.parametrize("solver", ["exact", "pgd", "reference", "modo"])
def test_weightings_of_cross_gramians_map_and_compile(solver):
    weighting = jd.modo(0.03) if solver == "modo" else jd.sdmgrad(solver=solver)
    statistics = torch.stack(cross_gramians())
    state = weighting.init(statistics[0])
    assert weighting.needs == "cross_gramian"
    want = torch.stack([weighting(statistic, state)[0] for statistic in statistics])
    close(vmap(lambda x: weighting(x, state)[0])(statistics), want, 10)
    fast, counter = compiled(lambda x, state: weighting(x, state))
    later = state
    for statistic, expected in zip(statistics, sequence(weighting, list(statistics)), strict=True):
        got, later = fast(statistic, later)
        close(got, expected, 10)
    assert counter.graphs == 1


@pytest.mark.parametrize(
    ("factory", "values"),
    [
        (lambda x: jd.nash_mtl(max_norm=x), [0.1, 5.0]),
        (lambda x: jd.fairgrad(x), [0.5, 3.0]),
        (lambda x: jd.pcd(x, beta=x), [0.1, 0.7]),
        (lambda x: jd.weighted(jd.modo(x, rho=x)), [0.01, 0.2]),
        (lambda x: jd.weighted(jd.sdmgrad(x)), [0.0, 2.0]),
    ],
    ids=["nash_mtl", "fairgrad", "pcd", "modo", "sdmgrad"],
)
def test_numbers_may_be_tensors(factory, values):
    points = torch.tensor(values, dtype=torch.float64)
    want = torch.stack([factory(value)(B)[0] for value in values])
    close(vmap(lambda x: factory(x)(B)[0])(points), want, 9)
    fast, counter = compiled(lambda x: factory(x)(B)[0])
    for point, expected in zip(points, want, strict=True):
        close(fast(point), expected, 9)
    assert counter.graphs == 1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: jd.nash_mtl(max_norm=0.0), "max_norm"),
        (lambda: jd.nash_mtl(update_every=0), "update_every"),
        (lambda: jd.fairgrad(-1.0), "alpha"),
        (lambda: jd.fairgrad(1.0, max_iter=0), "max_iter"),
        (lambda: jd.pcd(tau=-0.1), "tau"),
        (lambda: jd.pcd(tau=[0.1, -0.1]), "tau"),
        (lambda: jd.pcd(beta=1.0), "beta"),
        (lambda: jd.pcd(eps=-1e-8), "eps"),
        (lambda: jd.pcd(tau=[0.1, 0.1, 0.1])(B), "tau"),
        (lambda: jd.epo(torch.tensor(1.0)), "preference"),
        (lambda: jd.epo([1.0, 1.0], epsilon=-1.0), "epsilon"),
        (lambda: jd.pmgda([1.0, 1.0], sigma=0.0), "sigma"),
        (lambda: jd.pmgda([1.0, 1.0])(B, losses=torch.ones(3)), "preference"),
        (lambda: jd.modo(gamma=0.0), "gamma"),
        (lambda: jd.modo(rho=-1.0), "rho"),
        (lambda: jd.sdmgrad(lambda_=-0.1), "lambda_"),
        (lambda: jd.sdmgrad(solver="cvx"), "solver"),
        (lambda: jd.sdmgrad(momentum=1.0), "momentum"),
    ],
)
def test_numbers_out_of_range_are_named(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


def test_steps_of_pgd_are_differentiated_with_their_length():
    jac = torch.cat([B, matrix("gaussian", 2, 3)])
    rule = jd.weighted(jd.sdmgrad(solver="pgd", n_iter=3))
    along, step = matrix("gaussian", 5, 3, seed=3), 1e-6

    def weigh(jac):
        return rule(jac)[0]

    slope = torch.func.jvp(weigh, (jac,), (along,))[1]
    want = (weigh(jac + step * along) - weigh(jac - step * along)) / (2 * step)
    torch.testing.assert_close(slope, want, rtol=1e-5, atol=1e-6)
    assert (
        torch.autograd.functional.hessian(lambda x: weigh(x).sum(), torch.eye(3).double())
        .isfinite()
        .all()
    )
