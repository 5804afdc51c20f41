"""Numbers and identities of the random, robust and row-wise methods and of the combinators."""

import math

import pytest
import torch
import torchjd.aggregation as peer
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import as_matrix, as_tree, assert_trees_close
from tests.matrices import A2, A, B, C, K, matrix
from tests.oracles import project_simplex

LOSSES_A = torch.tensor([1.0, 2.0], dtype=torch.float64)


def close(got: Tensor, want, atol: float = 1e-7) -> None:
    """Compare with numbers rounded to eight digits."""
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=0, atol=atol)


def double(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weighting(rule: jd.Aggregator) -> jd.Weighting:
    """Return the weighting of a rule that has one."""
    assert rule.weighting is not None
    return rule.weighting


def keys(number: int) -> Tensor:
    return jd.random.split(jd.random.key(11), number)


def over_keys(rule: jd.Aggregator, jac: Tensor, number: int) -> Tensor:
    """Return the first direction for each of many keys."""
    return vmap(lambda key: rule(jac, rule.init(jac, key=key))[0])(keys(number))


# Random loss weighting


def test_rlw_weights_are_on_the_simplex_and_uniform_on_average():
    rule = weighting(jd.rlw())
    statistic = torch.zeros(3, 3, dtype=torch.float64)
    weights = vmap(lambda key: rule(statistic, rule.init(statistic, key=key))[0])(keys(20_000))
    assert (weights > 0).all()
    close(weights.sum(dim=1), torch.ones(20_000), atol=1e-12)
    error = 4 * weights.std(dim=0) / math.sqrt(20_000)
    assert ((weights.mean(dim=0) - 1 / 3).abs() < error).all()


def test_rlw_of_two_is_the_sigmoid_of_a_normal():
    weights = over_keys(jd.rlw(), torch.eye(2, dtype=torch.float64), 20_000)[:, 0]
    normal = torch.logit(weights) / math.sqrt(2)
    assert abs(normal.mean()) < 4 / math.sqrt(20_000)
    assert abs(normal.var() - 1) < 4 * math.sqrt(2 / 20_000)
    close((normal < 1).double().mean(), 0.8413447, atol=4 * 0.3654 / math.sqrt(20_000))


def test_rlw_equals_the_peer_on_the_same_normals(monkeypatch):
    state = jd.rlw().init(B, key=jd.random.key(5))
    draw = jd.random.split(state.key)[1]
    monkeypatch.setattr(torch, "randn", lambda *_, **__: jd.random.normal(draw, (3,)).double())
    close(jd.rlw()(B, state)[0], peer.Random()(B), atol=1e-6)


def test_random_rules_draw_anew_at_each_call():
    for rule in (jd.rlw(), jd.graddrop()):
        wide = matrix("gaussian", 3, 30)
        first, state = rule(wide, rule.init(wide, key=jd.random.key(0)))
        second, _ = rule(wide, state)
        assert not torch.allclose(first, second)


# Krum


@pytest.mark.parametrize("squared", [True, False])
def test_krum_values(squared):
    close(jd.krum(1, squared=squared)(K)[0], [1.0, 0.0, 1.0])
    close(jd.krum(1, 4, squared=squared)(K)[0], [1.25, 0.75, 1.5])
    close(weighting(jd.krum(1, 4, squared=squared))(K @ K.T)[0], [0.25, 0.25, 0.0, 0.25, 0.25])


def test_krum_squared_and_plain_distances_differ():
    rows = double([-1, -3], [1, -2], [-3, 0], [1, 0], [-2, 0])
    close(jd.krum(1)(rows)[0], rows[1])
    close(jd.krum(1, squared=False)(rows)[0], rows[4])
    close(peer.Krum(1)(rows), rows[4])


def test_krum_equal_scores_go_to_the_smaller_index():
    close(jd.krum(1, 2)(K)[0], (K[0] + K[1]) / 2)  # rows 0 and 4 tie behind row 1
    close(weighting(jd.krum(0, 2))(torch.eye(5, dtype=torch.float64))[0], [0.5, 0.5, 0, 0, 0])
    twice = torch.cat([K, K[1:2]])
    assert weighting(jd.krum(1))(twice @ twice.T)[0].argmax() == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "f", "q"), [(4, 1, 1), (7, 2, 3), (12, 4, 5), (9, 0, 9)])
def test_krum_equals_the_peer_and_a_double_loop(m, f, q, seed):
    jac = matrix("gaussian", m, 6, seed)
    close(jd.krum(f, q, squared=False)(jac)[0], peer.Krum(f, q)(jac), atol=1e-8)
    scores = []
    for i in range(m):
        distances = sorted(float((jac[i] - jac[j]).square().sum()) for j in range(m) if j != i)
        scores.append(sum(distances[: m - f - 2]))
    best = sorted(range(m), key=lambda i: scores[i])[:q]
    close(jd.krum(f, q)(jac)[0], jac[best].mean(dim=0), atol=1e-8)


@pytest.mark.parametrize("squared", [True, False])
def test_krum_survives_rounding_between_almost_equal_rows(squared):
    for seed in range(30):
        noise = 1e-12 * matrix("gaussian", 4, 3, seed + 100)
        close_rows = matrix("gaussian", 1, 3, seed) + noise  # squared distances below zero
        jac = torch.cat([matrix("gaussian", 1, 3, seed + 50), close_rows])
        got, _ = jd.krum(1, 4, squared=squared)(jac)
        close(got, close_rows[0], atol=1e-10)


def test_krum_says_how_many_objectives_it_needs():
    with pytest.raises(ValueError, match=r"at least 4 objectives \(n_byzantine \+ 3\), got 3"):
        jd.krum(1)(B)
    with pytest.raises(ValueError, match=r"at least 5 objectives \(n_selected\), got 3"):
        jd.krum(0, 5)(B)
    for options in ((-1, 1), (1, 0), (1, True)):
        with pytest.raises(ValueError, match="must be an int of at least"):
            jd.krum(*options)


# Trimmed mean


def test_trimmed_mean_values():
    close(jd.trimmed_mean(1)(B)[0], [0.0, 0.0, 0.0])
    close(jd.trimmed_mean(1)(C)[0], [0.5, -1.5])
    wild = double([1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2])
    close(jd.trimmed_mean(1)(wild)[0], [1.5, 2.5], atol=0)


@pytest.mark.parametrize(("m", "t"), [(3, 0), (3, 1), (6, 2), (9, 4)])
def test_trimmed_mean_equals_the_peer(m, t):
    jac = matrix("gaussian", m, 7, seed=t)
    got = jd.trimmed_mean(t)(jac)[0]
    close(got, peer.TrimmedMean(t)(jac), atol=1e-12)
    if t == 0:
        close(got, jac.mean(dim=0), atol=1e-12)
    if m == 2 * t + 1:
        close(got, jac.median(dim=0).values, atol=0)


def test_trimmed_mean_ignores_arbitrary_rows():
    jac = matrix("gaussian", 5, 4)
    for attack in (torch.inf, -torch.inf, 1e300):
        got = jd.trimmed_mean(1)(torch.cat([jac[:4], torch.full_like(jac[4:], attack)]))[0]
        assert (got >= jac[:4].min(dim=0).values).all()
        assert (got <= jac[:4].max(dim=0).values).all()


def test_trimmed_mean_says_how_many_objectives_it_needs():
    with pytest.raises(ValueError, match=r"at least 5 objectives \(2 trim_number \+ 1\), got 3"):
        jd.trimmed_mean(2)(B)
    with pytest.raises(ValueError, match="`trim_number` must be an int of at least 0, got -1"):
        jd.trimmed_mean(-1)


# GradDrop


@pytest.mark.parametrize(
    ("jac", "purity", "ups", "downs"),
    [
        (A, [0.6, 1, 1], [6, 2, 2], [-4, 0, 0]),
        (B, [1 / 2, 2 / 3, 1], [1, 2, 3], [-1, -1, 0]),
    ],
)
def test_graddrop_draws_one_sign_with_the_purity_as_probability(jac, purity, ups, downs):
    draws = over_keys(jd.graddrop(), jac, 10_000)
    up = draws == double(*ups)
    assert (up | (draws == double(*downs))).all()
    close(up.double().mean(dim=0), purity, atol=4 * 0.5 / 100)


@pytest.mark.parametrize("leak", [None, 0.3])
def test_graddrop_is_the_sum_on_average(leak):
    jac = matrix("gaussian", 3, 4)
    rule = jd.graddrop() if leak is None else jd.graddrop([leak] * 3)
    draws = over_keys(rule, jac, 20_000)
    error = 4 * draws.std(dim=0) / math.sqrt(20_000) + 1e-12
    assert ((draws.mean(dim=0) - jac.sum(dim=0)).abs() < error).all()


def test_graddrop_with_full_leak_is_the_sum():
    state = jd.graddrop().init(B, key=jd.random.key(1))
    close(jd.graddrop([1.0, 1.0, 1.0])(B, state)[0], B.sum(dim=0), atol=1e-12)


@pytest.mark.parametrize("leak", [None, [0.0, 0.25, 1.0]])
@pytest.mark.parametrize("f", [None, lambda p: p * p * (3 - 2 * p)])
def test_graddrop_equals_a_double_loop_and_the_peer(leak, f, monkeypatch):
    jac = matrix("gaussian", 3, 50, seed=8)
    rule = jd.graddrop(leak, f=f)
    state = rule.init(jac, key=jd.random.key(2))
    got, _ = rule(jac, state)
    uniform = jd.random.uniform(jd.random.split(state.key)[1], (50,)).double()
    want = torch.zeros(50, dtype=torch.float64)
    for k in range(50):
        column = jac[:, k]
        purity = (1 + column.sum() / column.abs().sum()) / 2
        level = purity if f is None else f(purity)
        for i in range(3):
            kept = level > uniform[k] if column[i] > 0 else level < uniform[k]
            share = 0.0 if leak is None else leak[i]
            want[k] += (share + (1 - share) * float(kept)) * column[i]
    close(got, want, atol=1e-12)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    options = {} if f is None else {"f": f}
    leaks = None if leak is None else double(*leak)
    close(got, peer.GradDrop(leak=leaks, **options)(jac), atol=1e-8)


def test_graddrop_draws_the_same_signs_in_every_dtype_and_cut():
    jac = matrix("integer", 4, 40)
    rule = jd.graddrop()
    for x in (jac.float(), jac.bfloat16()):
        got, _ = rule(x, rule.init(x, key=jd.random.key(3)))
        close(got, rule(jac, rule.init(jac, key=jd.random.key(3)))[0], atol=0)
    tree = as_tree(jac)
    got, _ = rule(tree, rule.init(tree, key=jd.random.key(3)))
    close(as_matrix(got), rule(jac, rule.init(jac, key=jd.random.key(3)))[0], atol=0)
    # Equal columns in different leaves are drawn by themselves.
    twice = {"a": A[:, :1].expand(2, 64), "b": A[:, :1].expand(2, 64)}
    got, _ = rule(twice, rule.init(twice, key=jd.random.key(3)))
    assert not torch.equal(got["a"], got["b"])


def test_graddrop_never_drops_a_column_of_one_sign():
    jac = double([0.0, -1.0, 2.0], [0.0, -3.0, 0.0])
    assert torch.equal(over_keys(jd.graddrop(), jac, 500), double(0, -4, 2).expand(500, 3))


def test_graddrop_draw_equal_to_the_purity_picks_the_negative_sign():
    rule = jd.graddrop()
    state = rule.init(A, key=jd.random.key(0))
    uniform = jd.random.uniform(jd.random.split(state.key)[1], (3,))
    close(jd.graddrop(f=lambda _: uniform)(A, state)[0], [-4.0, 0.0, 0.0], atol=0)


@pytest.mark.parametrize("leak", [[0.5], [[0.5, 0.5]]])
def test_graddrop_checks_the_leak(leak):
    with pytest.raises(ValueError, match="`leak` must"):
        rule = jd.graddrop(leak)
        rule(A, rule.init(A, key=jd.random.key(0)))


# Excess risks


def test_excess_mtl_values():
    rule, state = jd.excess_mtl(), None
    scaled = A * double([0.5], [1.5])
    for jac, weights in ((A, [0.5, 0.5]), (A, [0.5, 0.5]), (scaled, [0.28399233, 0.71600767])):
        grads, state = rule(jac, state)
        close(state.log_weights.exp(), weights)
        close(grads, jac.T @ double(*weights))


@pytest.mark.parametrize("n_warmup_steps", [0, 1, 3])
@pytest.mark.parametrize("kind", ["gaussian", "scaled", "zero"])
def test_excess_mtl_of_a_constant_jacobian_stays_uniform(kind, n_warmup_steps):
    jac = matrix(kind, 4, 5)
    rule = jd.excess_mtl(0.5, n_warmup_steps)
    state = rule.init(jac)
    for _ in range(6):
        _, state = rule(jac, state)
        alive = state.log_weights[jac.norm(dim=1) > 0]
        close(alive, alive[0].expand_as(alive), atol=1e-9)
    steps = torch.arange(1, max(n_warmup_steps, 1) + 1, dtype=torch.float64)
    torch.testing.assert_close(state.baseline, jac.abs().sum(dim=1) * steps.rsqrt().mean())


@pytest.mark.parametrize("n_warmup_steps", [1, 2, 4])
def test_excess_mtl_equals_the_peer_after_a_warm_up(n_warmup_steps):
    ours, theirs = jd.excess_mtl(0.7, n_warmup_steps, eps=1e-7), peer.ExcessMTL(0.7, n_warmup_steps)
    state = None
    for seed in range(7):
        jac = 100 * matrix("gaussian", 3, 6, seed)  # the peer adds 1e-7 to the baseline
        got, state = ours(jac, state)
        torch.testing.assert_close(got, theirs(jac), rtol=1e-8, atol=1e-8)


def test_excess_mtl_eps_is_under_the_root():
    _, state = jd.excess_mtl(eps=2.0)(A)
    close(state.baseline, (A.square() / (A.square() + 2).sqrt()).sum(dim=1))


def test_excess_mtl_first_step_of_the_peer_is_raw():
    ours, theirs, state = jd.excess_mtl(eps=1e-7), peer.ExcessMTL(), None
    close(theirs(A), A.T @ double(0.11920292, 0.88079708))
    got, state = ours(A)
    close(got, A.mean(dim=0))
    raw = torch.log_softmax(A.abs().sum(dim=1), dim=0)
    got, _ = ours(A2, state._replace(log_weights=raw))
    close(got, theirs(A2), atol=1e-6)


def test_excess_mtl_gives_a_late_task_its_own_baseline():
    rule = jd.excess_mtl()
    late = torch.cat([A, torch.zeros_like(A[:1])])
    _, state = rule(late)
    grads, state = rule(torch.cat([A, A2[:1]]), state)
    assert torch.isfinite(grads).all()
    close(state.baseline, [6.0, 8.0, 6.0])
    relative = double(math.sqrt(0.5), math.sqrt(0.5), 1.0)
    close(state.log_weights.exp(), torch.softmax(relative, dim=0))


def test_excess_mtl_does_not_see_the_scale_of_the_gradients():
    for s in (1e-6, 1e6):
        rule, state, scaled = jd.excess_mtl(), None, None
        for seed in range(4):
            jac = matrix("gaussian", 3, 5, seed)
            want, state = rule(jac, state)
            got, scaled = rule(s * jac, scaled)
            close(got / s, want, atol=1e-12)


# MoCo


def moco_loop(jacs, beta, gamma, rho, sigmas):
    """Follow the formulas with projections by the oracle of the simplex."""
    m = len(jacs[0])
    tracked, weights = torch.zeros_like(jacs[0]), torch.full((m,), 1 / m, dtype=torch.float64)
    directions = []
    for t, jac in enumerate(jacs, start=1):
        tracked = tracked - beta * t ** -sigmas[0] * (tracked - jac)
        ridge = tracked @ tracked.T + rho * torch.eye(m, dtype=torch.float64)
        weights = project_simplex(weights - gamma * t ** -sigmas[1] * ridge @ weights)
        directions.append(tracked.T @ weights)
    return directions


def test_moco_values():
    rule, state = jd.moco(0.5, 0.01, beta_sigma=0.0, gamma_sigma=0.0), None
    for weights, direction in (
        ([0.5125, 0.4875], [0.4375, 0.5, 0.5]),
        ([0.53710938, 0.46289063], [0.47167969, 0.75, 0.75]),
        ([0.56118469, 0.43881531], [0.33963394, 0.875, 0.875]),
    ):
        grads, state = rule(A, state)
        close(state.weights, weights)
        close(grads, direction)


def test_moco_values_of_the_softmax_form():
    rule, state = jd.moco(simplex="softmax", prescale=True), None
    for weights, direction in (
        ([0.50937390, 0.49062610], [0.23741922, 0.13962035, 0.13962035]),
        ([0.51619168, 0.48380832], [0.30802727, 0.18857414, 0.18857414]),
    ):
        grads, state = rule(A, state, losses=LOSSES_A)
        close(state.weights, weights)
        close(grads, direction)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_moco_equals_a_loop(rho):
    jacs = [matrix("gaussian", 4, 6, seed) for seed in range(6)]
    rule, state = jd.moco(0.8, 0.05, rho, beta_sigma=0.4, gamma_sigma=0.7), None
    for jac, want in zip(jacs, moco_loop(jacs, 0.8, 0.05, rho, (0.4, 0.7)), strict=True):
        got, state = rule(jac, state)
        close(got, want, atol=1e-10)


def test_moco_of_a_constant_jacobian_tends_to_mgda():
    rule, state = jd.moco(0.9, 0.02, beta_sigma=0.0, gamma_sigma=0.0), None
    for _ in range(2000):
        _, state = rule(B, state)
    close(rule(B, state)[0], jd.mgda()(B)[0])


def test_moco_softmax_is_no_projection():
    for simplex, want in (("projection", [0.9, 0.1]), ("softmax", [0.68997448, 0.31002552])):
        rule = jd.moco(gamma=0.0, simplex=simplex)
        _, state = rule(A, rule.init(A)._replace(weights=double(0.9, 0.1)))
        close(state.weights, want)


# DB-MTL


def test_db_mtl_values():
    close(jd.db_mtl(0.0)(A, losses=LOSSES_A)[0], [0.12948320, 1.68824718, 1.68824718])
    rule, state = jd.db_mtl(), None
    for want in ([0.01294832, 0.16882471, 0.16882471], [0.02460181, 0.32076696, 0.32076696]):
        got, state = rule(A, state, losses=LOSSES_A)
        close(got, want)
    got, _ = jd.db_mtl(0.0)(B, losses=double(1.0, 2.0, 0.5))
    close(got, [4.63324942, 4.63324943, 5.99999987])


def test_db_mtl_equals_a_loop():
    rule, state = jd.db_mtl(0.7, sigma=0.5), None
    averages = torch.zeros(3, 5, dtype=torch.float64)
    for k in range(1, 6):
        jac, losses = matrix("gaussian", 3, 5, k), double(0.1, 3.0, 10.0) / k
        beta = 0.7 * k**-0.5
        for i in range(3):
            averages[i] = beta * averages[i] + (1 - beta) * jac[i] / (losses[i] + 1e-8)
        lengths = [float(row.norm()) for row in averages]
        want = max(lengths) * sum(averages[i] / (lengths[i] + 1e-8) for i in range(3))
        got, state = rule(jac, state, losses=losses)
        close(got, want, atol=1e-9)


def test_db_mtl_without_memory_is_parallel_to_the_bisector():
    jac, losses = matrix("gaussian", 2, 5), double(0.2, 7.0)
    got, _ = jd.db_mtl(0.0)(jac, losses=losses)
    bisector = (jac / jac.norm(dim=1, keepdim=True)).sum(dim=0)
    close(torch.cosine_similarity(got, bisector, dim=0), 1.0, atol=1e-9)


def test_db_mtl_does_not_see_the_scale_of_a_loss():
    jac, losses = matrix("gaussian", 3, 5), double(0.2, 7.0, 1.0)
    scale, rule = double(1e-6, 1.0, 1e6), jd.db_mtl(0.5, eps=0.0)
    got, _ = rule(jac * scale[:, None], losses=losses * scale)
    close(got, rule(jac, losses=losses)[0], atol=1e-10)


def test_db_mtl_zero_row_adds_nothing():
    jac = torch.cat([A, torch.zeros_like(A[:1])])
    for eps in (0.0, 1e-8):
        rule = jd.db_mtl(0.0, eps=eps)
        got, _ = rule(jac, losses=double(1.0, 2.0, 3.0))
        close(got, rule(A, losses=LOSSES_A)[0], atol=1e-12)


# GradNorm


def gradnorm_state(weights, initial) -> tuple:
    """Return the weighting and a state after the first call."""
    rule = weighting(jd.gradnorm())
    state = rule.init(A @ A.T)
    return rule, state._replace(
        weights=double(*weights), initial_losses=double(*initial), step=state.step + 1
    )


def test_gradnorm_values():
    rule, state = gradnorm_state((1.0, 1.0), (1.0, 4.0))
    weights, later = rule(A @ A.T, state, losses=double(0.5, 3.0))
    close(weights, [1.0, 1.0])
    close(later.weights, [0.87296351, 1.12703649])
    close(rule(A @ A.T, later, losses=double(0.5, 3.0))[0], [0.87296351, 1.12703649])
    close(jd.gradnorm()(A, state, losses=double(0.5, 3.0))[0], [2.0, 2.0, 2.0])


def test_gradnorm_softmax_descends_on_logits():
    _, state = gradnorm_state((1.0, 1.0), (1.0, 4.0))
    rule = jd.gradnorm(lr=0.01, parametrization="softmax")
    grads, later = rule(A, state, losses=double(0.5, 3.0))
    close(grads, [2.0, 2.0, 2.0])
    close(later.weights.log().diff(), [2 * 0.01 * 5.20352735])
    close(later.weights.sum(), 2.0)


@pytest.mark.parametrize("parametrization", ["renormalized", "softmax"])
def test_gradnorm_step_is_the_derivative_of_its_loss(parametrization):
    jac, losses = matrix("gaussian", 4, 6), double(0.5, 3.0, 1.0, 0.9)
    rule = jd.gradnorm(0.8, 1e-3, parametrization=parametrization)
    state = rule.init(jac)._replace(
        weights=double(0.4, 1.2, 1.6, 0.8),
        initial_losses=double(1.0, 2.0, 3.0, 0.7),
        step=torch.tensor(1),
    )
    rates = losses / state.initial_losses
    rates = (rates / rates.mean()) ** 0.8

    def imbalance(variable):
        soft = parametrization == "softmax"
        weights = 4 * torch.softmax(variable, dim=0) if soft else variable
        norms = weights * jac.norm(dim=1)
        return (norms - norms.mean().detach() * rates).abs().sum()

    start = state.weights.log() if parametrization == "softmax" else state.weights
    start = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(imbalance(start), start)
    moved = start.detach() - 1e-3 * slope
    want = moved.softmax(dim=0) if parametrization == "softmax" else moved / moved.sum()
    close(rule(jac, state, losses=losses)[1].weights, 4 * want, atol=1e-12)


def test_gradnorm_without_restoring_force_equalises_the_norms():
    rule = jd.gradnorm(0.0, 1e-4)
    state = rule.init(B)
    for _ in range(6000):
        _, state = rule(B, state, losses=double(1.0, 1.0, 1.0))
    norms = state.weights * B.norm(dim=1)
    assert (norms.max() - norms.min()) / norms.mean() < 1e-2


def test_gradnorm_stays_finite_and_on_the_simplex():
    for losses in ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]):
        for lr in (0.5, 10.0):
            rule, state = jd.gradnorm(lr=lr), None
            for shift in ([0.0, 0.0, 0.0], [4.0, -2.0, 0.0], [-3.0, -3.0, -3.0], [0.5, 0.5, 1.0]):
                grads, state = rule(B, state, losses=double(*losses) + double(*shift))
                assert torch.isfinite(grads).all()
                assert (state.weights >= 0).all()
                close(state.weights.sum(), 3.0, atol=1e-12)


# CR-MOGM


def test_smoothed_values():
    rule, state = weighting(jd.smoothed(jd.mgda(), initial_weights=[0.5, 0.5])), None
    for want in ([0.51, 0.49], [0.519, 0.481], [0.5271, 0.4729]):
        weights, state = rule(A @ A.T, state)
        close(weights, want)
    rule, state = weighting(jd.smoothed(jd.mgda())), None
    for gramian, want in ((A @ A.T, [0.6, 0.4]), (None, [0.59, 0.41]), (None, [0.581, 0.419])):
        gramian = torch.eye(2, dtype=torch.float64) if gramian is None else gramian
        weights, state = rule(gramian, state)
        close(weights, want)


@pytest.mark.parametrize("initial", [None, [0.5, 0.2, 0.1, 0.2, 0.0]])
def test_smoothed_equals_the_peer(initial):
    inner = peer.KrumWeighting(1, 2)
    first = None if initial is None else double(*initial)
    theirs = peer.CRMOGMWeighting(inner, 0.7, first)
    rule = weighting(jd.smoothed(jd.krum(1, 2, squared=False), 0.7, initial_weights=initial))
    state = None
    for seed in range(6):
        jac = matrix("gaussian", 5, 4, seed)
        weights, state = rule(jac @ jac.T, state)
        close(weights, theirs(jac @ jac.T), atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("inner", [jd.mean(), jd.constant([3.0, -1.0, 0.5])])
def test_smoothed_constant_weights_do_not_change(inner, alpha):
    rule, state = jd.smoothed(inner, alpha), None
    for seed in range(4):
        jac = matrix("gaussian", 3, 4, seed)
        got, state = rule(jac, state)
        close(got, inner(jac)[0], atol=1e-12)


def test_smoothed_extremes_pass_through_and_freeze():
    through, frozen = jd.smoothed(jd.upgrad(), 0.0), jd.smoothed(jd.upgrad(), 1.0)
    states = [None, None]
    for seed in range(3):
        jac = matrix("gaussian", 3, 4, seed)
        got, states[0] = through(jac, states[0])
        close(got, jd.upgrad()(jac)[0], atol=1e-12)
        _, states[1] = frozen(jac, states[1])
        start = matrix("gaussian", 3, 4, 0)
        close(states[1].weights, weighting(jd.upgrad())(start @ start.T)[0], atol=1e-12)


# Every


def test_every_holds_the_weights():
    rule, state = weighting(jd.every(jd.upgrad(), 3)), None
    for t in range(8):
        jac, held = matrix("gaussian", 3, 4, t), matrix("gaussian", 3, 4, t // 3 * 3)
        weights, state = rule(jac @ jac.T, state)
        close(weights, weighting(jd.upgrad())(held @ held.T)[0], atol=1e-12)


def test_every_one_is_the_rule_itself():
    losses = double(1.0, 2.0, 0.5)
    for inner in (jd.rlw(), jd.gradnorm(), jd.smoothed(jd.mgda())):
        key = jd.random.key(0) if inner.name == "rlw" else None
        rule = jd.every(inner, 1)
        state, want_state = rule.init(B, key=key), inner.init(B, key=key)
        for seed in range(3):
            jac = matrix("gaussian", 3, 3, seed)
            got, state = rule(jac, state, losses=losses)
            want, want_state = inner(jac, want_state, losses=losses)
            close(got, want, atol=1e-12)
            assert_trees_close(state.inner, want_state)


def test_every_lets_the_inner_rule_see_every_kth_gramian():
    rule, inner = jd.every(jd.rlw(), 2), jd.rlw()
    state, inner_state = (r.init(B, key=jd.random.key(4)) for r in (rule, inner))
    for t in range(6):
        _, state = rule(B, state)
        if t % 2 == 0:
            _, inner_state = inner(B, inner_state)
        assert_trees_close(state.inner, inner_state)


# What combinators share

COMBINATORS = {"smoothed": jd.smoothed, "every": lambda rule: jd.every(rule, 2)}
every_combinator = pytest.mark.parametrize("name", COMBINATORS)


@every_combinator
def test_combinators_keep_the_type_the_statistic_and_the_name(name):
    combine = COMBINATORS[name]
    for rule in (jd.mean(), jd.mgda()):
        both = combine(rule), combine(weighting(rule))
        assert isinstance(both[0], jd.Aggregator)
        assert isinstance(both[1], jd.Weighting)
        assert weighting(both[0]).needs == both[1].needs == weighting(rule).needs
        assert repr(both[0]) == f"Aggregator({name}({rule.name}))"
    cross = jd.stateless("cross", lambda g: g.diagonal(), needs="cross_gramian")
    assert combine(cross).needs == "cross_gramian"


@every_combinator
def test_combinators_say_what_they_cannot_wrap(name):
    combine = COMBINATORS[name]
    with pytest.raises(ValueError, match=rf"`{name}` .* got `trimmed_mean`"):
        combine(jd.trimmed_mean(1))
    scalarizer = jd.Scalarizer("first", lambda losses, key: (), lambda losses, s: (losses[0], s))
    with pytest.raises(TypeError, match=rf"`{name}` .* got Scalarizer\(first\)"):
        combine(scalarizer)
    with pytest.raises(TypeError, match="Call the factory"):
        combine(jd.upgrad)


@every_combinator
def test_combinators_keep_the_errors_of_the_inner_rule(name):
    combine = COMBINATORS[name]
    with pytest.raises(ValueError, match="`key` must be given to `rlw`"):
        combine(jd.rlw()).init(B)
    with pytest.raises(ValueError, match="`gradnorm` must be given the losses"):
        combine(jd.gradnorm())(B)


@every_combinator
def test_combinators_nest(name):
    rule = COMBINATORS[name](jd.smoothed(jd.every(jd.rlw(), 3), 0.5))
    state = rule.init(B, key=jd.random.key(0))
    assert state.inner.inner.inner.key.shape == (2,)
    for _ in range(4):
        _, state = rule(B, state)
    assert torch.isfinite(rule(B, state)[0]).all()


# Sweeps and other kinds of tensors

SWEEPS = {
    "excess_mtl": (lambda x: jd.excess_mtl(x), [0.1, 1.0]),
    "excess_mtl[n_warmup_steps]": (lambda x: jd.excess_mtl(1.0, x), [1.0, 2.0]),
    "moco[beta]": (lambda x: jd.moco(x), [0.2, 0.9]),
    "moco[gamma]": (lambda x: jd.moco(gamma=x, gamma_sigma=x), [0.01, 0.1]),
    "moco[rho]": (lambda x: jd.moco(rho=x), [0.0, 1.0]),
    "db_mtl": (lambda x: jd.db_mtl(x, sigma=x), [0.0, 0.9]),
    "gradnorm[alpha]": (lambda x: jd.gradnorm(x), [0.0, 5.0]),
    "gradnorm[lr]": (lambda x: jd.gradnorm(lr=x), [0.01, 0.1]),
    "smoothed": (lambda x: jd.smoothed(jd.mgda(), x), [0.1, 0.9]),
    "every": (lambda x: jd.every(jd.mgda(), x), [1, 3]),
    "graddrop": (lambda x: jd.graddrop(x.expand(3)), [0.0, 0.5]),
}


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyper_parameters_can_be_mapped(name, dtype):
    make, values = SWEEPS[name]
    jacs = [matrix("gaussian", 3, 5, seed).to(dtype) for seed in range(3)]

    def run(value):
        rule = make(value)
        state = rule.init(jacs[0], key=jd.random.key(0))
        grads = []
        for jac in jacs:
            grad, state = rule(jac, state, losses=double(1.0, 2.0, 0.5) * jac[:, 0].square())
            grads.append(grad)
        return grads[-1], state

    sweep = torch.tensor(values)
    got_grads, got_state = vmap(run)(sweep)
    for i, value in enumerate(sweep):
        grads, state = run(value)
        torch.testing.assert_close(got_grads[i], grads)
        for got, want in zip(got_state, state, strict=True):
            if isinstance(got, Tensor):
                torch.testing.assert_close(got[i], want)
    assert not torch.allclose(got_grads[0], got_grads[1])


@pytest.mark.parametrize(
    "rule",
    [jd.trimmed_mean(1), jd.graddrop(), jd.excess_mtl(), jd.moco(), jd.db_mtl()],
    ids=lambda rule: rule.name,
)
def test_complex_parameters_are_pairs_of_real_ones(rule):
    pairs = [matrix("gaussian", 3, 8, seed).reshape(3, 2, 2, 2) for seed in range(2)]
    losses, key = double(1.0, 2.0, 0.5), jd.random.key(0)
    state = rule.init(torch.view_as_complex(pairs[0]), key=key)
    want_state = rule.init(pairs[0], key=key)
    for pair in pairs:
        got, state = rule(torch.view_as_complex(pair), state, losses=losses)
        want, want_state = rule(pair, want_state, losses=losses)
        assert got.dtype == torch.complex128
        close(torch.view_as_real(got), want, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: jd.moco(beta=1.5), "beta"),
        (lambda: jd.moco(gamma=-1.0), "gamma"),
        (lambda: jd.db_mtl(beta=-0.1), "beta"),
        (lambda: jd.excess_mtl(-1.0), "robust_step_size"),
        (lambda: jd.gradnorm(lr=-1.0), "lr"),
        (lambda: jd.gradnorm(lr=math.nan), "lr"),
        (lambda: jd.smoothed(jd.mean(), 1.1), "alpha"),
        (lambda: jd.every(jd.mean(), 0), "k"),
    ],
)
def test_numbers_out_of_range_are_errors(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be between"):
        make()


def test_a_state_of_other_parameters_is_an_error():
    for rule in (jd.moco(), jd.db_mtl(), jd.excess_mtl()):
        state = rule.init(as_tree(B))
        with pytest.raises(ValueError, match="structure of the Jacobian"):
            rule(B, state, losses=double(1.0, 2.0, 3.0))
        with pytest.raises(ValueError, match=r"`state\.\w+\['a.0'\]` of"):
            rule({"z": [B], "a": (B, None)}, state, losses=double(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "rule",
    [
        jd.graddrop([0.1, 0.2, 0.3]),
        jd.trimmed_mean(1),
        jd.excess_mtl(),
        jd.moco(prescale=True),
        jd.db_mtl(),
        jd.smoothed(jd.gradnorm()),
    ],
    ids=lambda rule: rule.name,
)
def test_two_steps_can_be_differentiated(rule):
    jac, losses = matrix("gaussian", 3, 4), double(1.0, 2.0, 0.5)

    def second(jac):
        first, state = rule(jac, rule.init(jac, key=jd.random.key(0)), losses=losses)
        return rule(jac * (1 + first), state, losses=losses / 2)[0]

    assert torch.autograd.gradcheck(second, jac.requires_grad_())
    for kind in ("zero", "duplicate"):
        assert torch.func.jacrev(second)(matrix(kind, 3, 4)).isfinite().all()
    assert torch.func.jacrev(second)(torch.zeros(3, 4)).isfinite().all()
