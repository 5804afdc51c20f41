"""Identities between methods, parity with the object-oriented peer, ranks, derivatives, errors."""

import pytest
import torch
import torchjd.aggregation as peer
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import as_matrix, as_tree, row_weights, vector_of
from tests.matrices import A, B, E, matrix
from torchjd_func.aggregation._orders import shuffled_others

GRAMIAN_METHODS = {
    "cagrad": jd.cagrad(0.5),
    "cagrad[2]": jd.cagrad(2.0),
    "pcgrad": jd.pcgrad(),
    "gradvac": jd.gradvac(),
    "imtl_g": jd.imtl_g(),
    "aligned_mtl": jd.aligned_mtl(),
    "aligned_mtl[median]": jd.aligned_mtl(scale="median"),
    "aligned_mtl[rmse]": jd.aligned_mtl(scale="rmse"),
    "config": jd.config(),
    "config[max]": jd.config(length="max"),
}
SYMMETRIC = [name for name in GRAMIAN_METHODS if name not in ("pcgrad", "gradvac")]
every_gramian_method = pytest.mark.parametrize("name", GRAMIAN_METHODS)
SHAPES = ((2, 5), (3, 3), (4, 9), (6, 20))


def close(got, want, tol=1e-8):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0)


def test_two_objectives_pcgrad_is_twice_upgrad_and_the_first_gradvac():
    for seed in range(6):
        jac = matrix("gaussian", 2, 4, seed=seed)
        close(vector_of(jd.pcgrad(), jac), 2 * vector_of(jd.upgrad(), jac))
        close(vector_of(jd.gradvac(), jac), vector_of(jd.pcgrad(), jac))


@pytest.mark.parametrize("seed", range(3))
def test_first_gradvac_is_pcgrad(seed):
    jac = matrix("gaussian", 5, 4, seed=seed)
    close(vector_of(jd.gradvac(), jac, seed), vector_of(jd.pcgrad(), jac, seed))


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "config"])
def test_linear_under_scaling(name):
    jac = matrix("gaussian", 4, 6, seed=1)
    one, two = torch.rand(2, 4, 1, generator=torch.Generator().manual_seed(0)).double() + 0.1
    aggregator = GRAMIAN_METHODS[name]
    _, state = aggregator(jac.flip(0), aggregator.init(jac, key=jd.random.key(0)))
    parts = [aggregator(scale * jac, state)[0] for scale in (one, two, one + two)]
    close(parts[0] + parts[1], parts[2])


@every_gramian_method
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_weights_ignore_the_overall_scale(name, scale):
    for shape in SHAPES:
        jac = matrix("gaussian", *shape, seed=2)
        close(
            row_weights(GRAMIAN_METHODS[name], scale * jac), row_weights(GRAMIAN_METHODS[name], jac)
        )


@every_gramian_method
def test_weights_ignore_rotations(name):
    jac = matrix("gaussian", 4, 6, seed=3)
    rotation = torch.linalg.qr(matrix("gaussian", 6, 6, seed=4)).Q
    close(
        row_weights(GRAMIAN_METHODS[name], jac @ rotation), row_weights(GRAMIAN_METHODS[name], jac)
    )


@pytest.mark.parametrize("name", SYMMETRIC)
def test_permuted_rows_permute_weights(name):
    jac, order = matrix("gaussian", 5, 7, seed=5), torch.tensor([3, 0, 4, 1, 2])
    close(
        row_weights(GRAMIAN_METHODS[name], jac[order]),
        row_weights(GRAMIAN_METHODS[name], jac)[order],
    )


def test_two_objectives_imtl_g_and_config_bisect_the_angle():
    for seed in range(6):
        jac = matrix("gaussian", 2, 4, seed=seed)
        bisector = (jac / jac.norm(dim=1, keepdim=True)).sum(0)
        for method in (jd.imtl_g(), jd.config()):
            close(cosine(vector_of(method, jac), bisector).item(), 1.0)


def test_imtl_g_is_config_up_to_a_signed_scale():
    cases = [E, *(matrix("gaussian", m, 8, seed=m) for m in (2, 3, 5))]
    signs = []
    for jac in cases:
        sign = torch.linalg.solve(jac @ jac.T, jac.norm(dim=1)).sum().sign()
        close(cosine(vector_of(jd.imtl_g(), jac), vector_of(jd.config(), jac)), sign)
        signs.append(sign.item())
    assert set(signs) == {1.0, -1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_cagrad_identities(shape):
    jac = matrix("gaussian", *shape, seed=6)
    mean = jac.mean(0)
    close(vector_of(jd.cagrad(0.0), jac), mean)
    for c in (0.1, 0.7, 1.0, 3.0):
        direction = vector_of(jd.cagrad(c), jac)
        close((direction - mean).norm(), c * mean.norm())
        if c >= 1:
            assert (jac @ direction).min() > -1e-9 * mean.norm()


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_rows_are_orthogonal_and_of_equal_length(scale):
    for jac in (matrix("gaussian", 4, 6), matrix("gaussian", 4, 2), matrix("duplicate", 4, 6)):
        aggregator = jd.aligned_mtl
        units = torch.eye(4, dtype=torch.float64)
        aligned = torch.stack([vector_of(aggregator(unit, scale), jac) for unit in units])
        got, values = aligned @ aligned.T, torch.linalg.svdvals(jac)
        values = values[values > 1e-7 * values[0]].square()
        sigma = {"min": values.amin(), "median": values.median(), "rmse": values.mean()}[scale]
        close(got, sigma * jac @ torch.linalg.pinv(jac, rtol=1e-7))


def feed_orders(monkeypatch, orders, with_own):
    """Have the peer's calls to `torch.randperm` return the orders of one row after another."""
    rows = iter(enumerate(orders.tolist()))

    def fed(n):
        i, order = next(rows)
        assert n == len(order) + with_own
        return torch.tensor([i, *order] if with_own else [j - (j > i) for j in order])

    monkeypatch.setattr(torch, "randperm", fed)


@pytest.mark.parametrize("shape", SHAPES)
def test_pcgrad_and_gradvac_equal_the_peer(shape, monkeypatch):
    theirs, ours = peer.GradVac(beta=0.5, eps=0.0), jd.gradvac(0.5)
    first = matrix("gaussian", *shape, seed=7)
    state = ours.init(first, key=jd.random.key(0))
    for seed in range(3):
        jac = matrix("gaussian", *shape, seed=seed)
        orders = shuffled_others(jd.random.split(state.key)[1], len(jac))
        got, after = jd.pcgrad()(jac, jd.pcgrad().init(jac, key=state.key))
        feed_orders(monkeypatch, orders, with_own=True)
        close(got, peer.PCGrad()(jac))
        assert torch.equal(after.key, jd.random.split(state.key)[0])
        feed_orders(monkeypatch, orders, with_own=False)
        got, state = ours(jac, state)
        close(got, theirs(jac))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_others_equal_the_peer(shape):
    preference = torch.linspace(0.5, 2.0, shape[0], dtype=torch.float64)
    for seed in range(4):
        jac = matrix("gaussian", *shape, seed=seed)
        close(vector_of(jd.imtl_g(), jac), peer.IMTLG()(jac))
        close(vector_of(jd.config(), jac), peer.ConFIG()(jac))
        close(vector_of(jd.config(preference), jac), peer.ConFIG(preference)(jac))
        for scale in ("min", "median", "rmse"):
            close(
                vector_of(jd.aligned_mtl(scale=scale), jac), peer.AlignedMTL(scale_mode=scale)(jac)
            )
        close(vector_of(jd.aligned_mtl(preference), jac), peer.AlignedMTL(preference)(jac))


def test_the_peer_scales_rounding_and_sees_scale():
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert peer.ConFIG()(opposite).abs().max() > 0  # pure rounding
    assert not vector_of(jd.config(), opposite).any()
    tiny = 1e-9 * A
    assert not torch.allclose(peer.GradVac()(tiny), 1e-9 * peer.GradVac()(A), rtol=1e-3, atol=0)
    close(1e9 * vector_of(jd.gradvac(), tiny), vector_of(jd.gradvac(), A))


@pytest.mark.parametrize("name", ["imtl_g", "aligned_mtl", "aligned_mtl[rmse]", "config"])
def test_dependent_rows_in_float32_are_seen_as_such(name):
    aggregator = GRAMIAN_METHODS[name]
    for seed in range(5):
        exact = matrix("gaussian", 3, 40, seed=seed)
        jac = torch.cat([exact, exact[:1] / 3])
        want = vector_of(aggregator, jac)
        got = vector_of(aggregator, jac.float()).double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_rank_tolerance_can_be_chosen():
    jac = torch.tensor([[1.0, 0.0], [3.0, 1e-3]], dtype=torch.float64)
    norms = jac.norm(dim=1)
    close(row_weights(jd.imtl_g(rtol=1e-3), jac), torch.tensor([0.25, 0.75]).double(), tol=1e-6)
    close(row_weights(jd.imtl_g(), jac), torch.tensor([0.75, 0.25]).double(), tol=1e-6)
    got = row_weights(jd.config([1.0, 2.0], rtol=1e-3), jac) * norms  # rows count as parallel
    close(got[0], got[1], tol=1e-6)
    assert row_weights(jd.config([1.0, 2.0]), jac)[0] < 0
    smallest, largest = torch.linalg.svdvals(jac).flip(0)
    full, cut = (vector_of(jd.aligned_mtl(rtol=rtol), jac) for rtol in (0.0, 1e-3))
    assert full.norm() < 2 * smallest < 1e-3 * largest
    assert cut.norm() > 0.5 * largest


@every_gramian_method
def test_derivatives(name):
    aggregator = GRAMIAN_METHODS[name]
    jac = matrix("gaussian", 3, 4, seed=8)
    state = aggregator.init(jac, key=jd.random.key(0))
    torch.autograd.gradcheck(lambda x: aggregator(x, state)[0], jac.clone().requires_grad_())


@pytest.mark.parametrize("name", ["cagrad", "pcgrad", "gradvac", "imtl_g", "config"])
def test_derivatives_exist_at_symmetric_points(name):
    aggregator = GRAMIAN_METHODS[name]
    jac = torch.eye(3, 4, dtype=torch.float64)
    state = aggregator.init(jac, key=jd.random.key(0))
    for point in (jac, torch.cat([jac, torch.zeros(1, 4)])[1:].double()):
        slopes = torch.func.jacrev(lambda x: aggregator(x, state)[0])(point)
        assert torch.isfinite(slopes).all()


def test_config_momentum_can_be_differentiated():
    aggregator, jac = jd.config_momentum(visit="all"), matrix("gaussian", 3, 4, seed=8)
    _, state = aggregator(jac.flip(-1), aggregator.init(jac))
    torch.autograd.gradcheck(lambda x: aggregator(x, state)[0], jac.clone().requires_grad_())


def test_swept_hyper_parameters_may_be_mapped():
    sweep = torch.tensor([0.1, 0.5, 0.9, 2.0], dtype=torch.float64)
    got = vmap(lambda c: jd.cagrad(c)(B)[0])(sweep)
    close(got, torch.stack([vector_of(jd.cagrad(float(c)), B) for c in sweep]))
    state = jd.gradvac().init(A, key=jd.random.key(0))
    got = vmap(lambda beta: jd.gradvac(beta)(A, state)[1].phi)(sweep[:3])
    close(got[1], jd.gradvac(0.5)(A, state)[1].phi)
    for factory in (jd.config, jd.aligned_mtl):
        preferences = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
        got = vmap(lambda b, make=factory: make(b)(A)[0])(preferences)
        close(got, torch.stack([vector_of(factory(b), A) for b in preferences]))
    jac = matrix("gaussian", 2, 3)

    def two_steps(beta):
        aggregator = jd.config_momentum(beta, beta, visit="all")
        _, state = aggregator(jac, aggregator.init(jac))
        return aggregator(jac.flip(0), state)[0]

    close(vmap(two_steps)(sweep[:3]), torch.stack([two_steps(float(b)) for b in sweep[:3]]))


def test_config_momentum_keeps_moments_in_float32_or_better():
    jac = as_tree(matrix("gaussian", 3, 5).to(torch.bfloat16))
    aggregator = jd.config_momentum(visit="all")
    grads, state = aggregator(jac, aggregator.init(jac))
    assert as_matrix(grads).dtype == torch.bfloat16
    for moments in (state.momenta, state.first, state.second):
        assert as_matrix(moments).dtype == torch.float32


def test_complex_leaves_count_as_pairs_of_reals():
    real = matrix("gaussian", 3, 8, seed=9)
    pairs = torch.view_as_complex(real.reshape(3, 4, 2))
    for aggregator in (jd.cagrad(), jd.imtl_g(), jd.aligned_mtl(), jd.config()):
        got = torch.view_as_real(vector_of(aggregator, pairs)).flatten()
        close(got, vector_of(aggregator, real))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jd.cagrad(-0.1), r"`c` must be in \[0, inf\)"),
        (lambda: jd.cagrad(rescale="c"), "`rescale` must be one of"),
        (lambda: jd.pcgrad(reduction="max"), "`reduction` must be one of"),
        (lambda: jd.gradvac(1.5), r"`beta` must be in \[0, 1\]"),
        (lambda: jd.gradvac(reduction="max"), "`reduction` must be one of"),
        (lambda: jd.imtl_g(rtol=-1.0), r"`rtol` must be in \[0, 1\]"),
        (lambda: jd.aligned_mtl(scale="max"), "`scale` must be one of"),
        (lambda: jd.config(length="mean"), "`length` must be one of"),
        (lambda: jd.config_momentum(1.0), r"`beta_1` must be in \[0, 1\)"),
        (lambda: jd.config_momentum(visit="random"), "`visit` must be one of"),
        (lambda: jd.config([1.0])(A), "`preference` must have one entry for each of the 2"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
