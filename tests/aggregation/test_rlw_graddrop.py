"""Numbers and laws of the methods that draw: RLW and GradDrop."""

import math

import pytest
import torch
import torchjd.aggregation as peer
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import as_matrix, as_tree, close, double, weighting
from tests.matrices import A, B, matrix


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
    draw = state.key
    monkeypatch.setattr(torch, "randn", lambda *_, **__: jd.random.normal(draw, (3,)).double())
    close(jd.rlw()(B, state)[0], peer.Random()(B), atol=1e-6)


def test_random_rules_draw_anew_at_each_call():
    for rule in (jd.rlw(), jd.graddrop()):
        wide = matrix("gaussian", 3, 30)
        first, state = rule(wide, rule.init(wide, key=jd.random.key(0)))
        second, _ = rule(wide, state)
        assert not torch.allclose(first, second)


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


@pytest.mark.parametrize("rule", [jd.rlw(), jd.graddrop(), jd.pcgrad(), jd.gradvac()])
def test_a_key_follows_the_statistic(rule):
    jac = torch.empty(3, 4, device="meta")
    assert rule.init(jac, key=jd.random.key(0)).key.device == jac.device
    if rule.weighting is not None:
        state = rule.weighting.init(jac @ jac.mT, key=jd.random.key(0))
        assert state.key.device == jac.device
