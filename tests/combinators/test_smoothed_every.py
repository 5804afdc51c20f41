"""What rules made of rules promise."""

import pytest
import torch
import torchjd.aggregation as peer

import torchjd_func as jd
from tests.helpers import assert_trees_close, close, double, weighting
from tests.matrices import A, B, matrix

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
        assert repr(both[0]).startswith(f"Aggregator({name}({rule.name})")
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
