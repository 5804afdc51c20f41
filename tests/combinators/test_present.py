"""Rules made of rules, with objectives that a batch does not have."""

import itertools
from functools import partial

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, compiled, double
from tests.matrices import matrix
from tests.short import ROWS, SHORT
from torchjd_func import _tree, measures

M = 4
CHOICES = [torch.tensor(flags) for flags in itertools.product([True, False], repeat=M)]
SOME = [mask for mask in CHOICES if mask.sum() >= 1 and not mask.all()]
MASK = torch.tensor([True, False, True, True])
NONE = torch.zeros(M, dtype=torch.bool)
JACS = [
    {"a.w": matrix("gaussian", M, 6, seed).reshape(M, 2, 3), "b.w": matrix("scaled", M, 3, seed)}
    for seed in range(4)
]
LOSSES = double(0.5, 3.0, 1.2, 2.0)


SEEN = {name: getattr(measures, name) for name in measures.__all__}
SEEN |= {"losses": lambda seen: seen.losses}
BY_ROWS = {
    name: measure
    for name, measure in SEEN.items()
    if name not in ("weights", "entropy", "dual_cone_residual", "min_norm_residual")
}

RULES = {
    "smoothed": jd.smoothed(SHORT, 0.7),
    "smoothed[initial]": jd.smoothed(SHORT, 0.7, initial_weights=[0.4, 0.3, 0.2, 0.1]),
    "every": jd.every(SHORT, 2),
    "smoothed[every]": jd.smoothed(jd.every(SHORT, 3), 0.5),
    "grouped": jd.grouped(SHORT, jd.by_layer),
    "grouped[rows]": jd.grouped({"a": ROWS, "b": SHORT}, jd.by_layer),
    "grouped[smoothed]": jd.grouped(jd.smoothed(SHORT), jd.by_layer),
    "monitored": jd.monitored(SHORT, SEEN),
    "monitored[rows]": jd.monitored(ROWS, BY_ROWS),
    "monitored[grouped]": jd.monitored(jd.grouped(SHORT, jd.by_layer), BY_ROWS),
    "grouped[monitored]": jd.grouped(jd.monitored(SHORT, SEEN), jd.by_layer),
    "every[monitored]": jd.every(jd.monitored(SHORT, SEEN), 2),
}
every_rule = pytest.mark.parametrize("name", RULES)


def select(tree, mask):
    """Return the parts of the present objectives: of a state, by its dimensions of size m."""

    def part(leaf):
        for dim in range(leaf.ndim):
            if leaf.shape[dim] == M:
                leaf = leaf.index_select(dim, mask.nonzero().flatten())
        return leaf

    return _tree.map(part, tree)


def alone(name, mask) -> jd.Aggregator:
    """Return the rule for the present objectives alone."""
    if name != "smoothed[initial]":
        return RULES[name]
    return jd.smoothed(SHORT, 0.7, initial_weights=double(0.4, 0.3, 0.2, 0.1)[mask])


def spoil(tree, mask):
    """Return rows, or losses, that are not numbers where an objective is absent."""
    return _tree.map(lambda leaf: torch.where(_tree.per_row(mask, leaf), leaf, torch.nan), tree)


def experienced(name):
    """Return a rule, and a state after two calls."""
    rule, state = RULES[name], None
    for jac in JACS[:2]:
        _, state = rule(jac, state, losses=LOSSES)
    return rule, state


@every_rule
def test_equals_the_rule_of_the_present_rows(name):
    for mask in SOME[::2]:
        rule, state = experienced(name)
        own = select(state, mask)
        for jac in JACS:
            spoilt, values = spoil(jac, mask), spoil(LOSSES, mask)
            got, state = rule(spoilt, state, losses=values, present=mask)
            few = _tree.map(lambda leaf, mask=mask: leaf[mask], jac)
            want, own = alone(name, mask)(few, own, losses=LOSSES[mask])
            assert_trees_close(got, want, rtol=1e-7)
            assert_trees_close(select(state, mask), own, rtol=1e-6, atol=1e-7)


@every_rule
def test_state_of_what_is_absent_stays(name):
    rule, state = experienced(name)
    _, after = rule(JACS[2], state, losses=spoil(LOSSES, MASK), present=MASK)
    assert_same_layout(after, state)
    for path, got, before in zip(
        _tree.names(state), _tree.leaves(after), _tree.leaves(state), strict=True
    ):
        if "measures" not in path and M in before.shape:
            assert torch.equal(select(got, ~MASK), select(before, ~MASK))


@pytest.mark.parametrize("name", [name for name in RULES if "monitored" in name])
def test_measures_of_what_is_absent_are_not_numbers(name):
    _, state = RULES[name](JACS[0], losses=spoil(LOSSES, MASK), present=MASK)
    for measure, value in jd.read_measures(state).items():
        pair = measure == "pairwise_cosine"
        seen = (MASK & MASK.unsqueeze(-1)) if pair else MASK if value.shape[-1:] == (M,) else None
        want = torch.zeros_like(value).bool() if seen is None else (~seen).expand(value.shape)
        assert torch.equal(value.isnan(), want)


@every_rule
def test_without_objectives_nothing_happens(name):
    rule, state = experienced(name)
    got, after = rule(spoil(JACS[2], NONE), state, losses=spoil(LOSSES, NONE), present=NONE)
    assert all(not leaf.any() for leaf in _tree.leaves(got))
    assert_trees_close(after, state, rtol=0, atol=0)


@every_rule
def test_all_objectives_present_is_no_mask(name):
    rule, state = experienced(name)
    got = rule(JACS[2], state, losses=LOSSES, present=~NONE)
    assert_trees_close(got, rule(JACS[2], state, losses=LOSSES), rtol=1e-9)


@every_rule
def test_steps_with_absent_objectives_are_one_graph_and_map(name):
    rule, state = experienced(name)

    def run(mask):
        return rule(spoil(JACS[2], mask), state, losses=spoil(LOSSES, mask), present=mask)

    masks = (MASK, NONE, ~NONE)
    want = _tree.stack([run(mask) for mask in masks])
    assert_trees_close(vmap(run)(torch.stack(masks)), want, rtol=1e-7, atol=1e-9)
    fast, counter = compiled(run)
    assert_trees_close(_tree.stack([fast(mask) for mask in masks]), want, rtol=1e-7, atol=1e-9)
    assert counter.graphs == 1


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].partition is not None])
def test_gramians_of_groups_are_weighed_alike(name):
    rule, state = experienced(name)
    flat, paths = _tree.leaves(JACS[2]), _tree.paths(JACS[2])
    assert rule.partition is not None
    groups, weigh = rule.partition(paths)
    gramians = _tree.gramians(_tree.blocks(flat, groups), groups)
    weights, after = weigh(gramians, state, LOSSES, MASK)
    grads, want = rule(JACS[2], state, losses=LOSSES, present=MASK)
    assert_trees_close(after, want)
    rows = dict(zip([i for (i,) in groups], weights, strict=True))
    got = [torch.tensordot(rows[i], leaf, dims=1) for i, leaf in enumerate(flat)]
    assert_trees_close(got, _tree.leaves(grads))


def test_smoothed_starts_from_the_first_weights_of_each_objective():
    rule = jd.smoothed(SHORT, 0.9)
    _, state = rule(JACS[0], losses=LOSSES, present=MASK)
    _, state = rule(JACS[1], state, losses=LOSSES)
    inner = SHORT(JACS[0], losses=LOSSES, present=MASK)[1]
    assert SHORT.weighting is not None
    fresh, _ = SHORT.weighting(_tree.gramian(JACS[1]), inner, losses=LOSSES)
    assert_trees_close(state.weights[1], fresh[1])
    assert state.step.tolist() == [2, 1, 2, 2]


def test_every_renews_for_an_objective_without_weights():
    rule, state, ages = jd.every(SHORT, 3), None, []
    for mask in (MASK, MASK, ~NONE, MASK, ~MASK):
        _, state = rule(JACS[0], state, losses=LOSSES, present=mask)
        ages.append(state.age.tolist())
    assert ages == [[1, 0, 1, 1], [2, 0, 2, 2], [1, 1, 1, 1], [2, 1, 2, 2], [2, 2, 2, 2]]


def test_watched_scalarizers():
    seen = {"weights": measures.weights, "entropy": measures.entropy, "l": lambda seen: seen.losses}
    rule, inner = jd.monitored(jd.scalarizers.famo(), seen), jd.scalarizers.famo()
    values = spoil(LOSSES, MASK)
    loss, state = rule(values, present=MASK)
    want, plain = inner(LOSSES[MASK])
    weights = torch.func.grad(lambda losses: inner(losses)[0])(LOSSES[MASK])
    got = jd.read_measures(state)
    assert_trees_close((loss, got["weights"][MASK], got["l"][MASK]), (want, weights, LOSSES[MASK]))
    assert_trees_close(got["entropy"], torch.special.entr(weights).sum())
    assert got["weights"][1].isnan()
    assert rule.observe is not None and inner.observe is not None
    after = rule.observe(values / 2, state, present=MASK)
    assert_trees_close(select(after.inner, MASK), inner.observe(LOSSES[MASK] / 2, plain))


def test_measures_of_whole_numbers_have_no_nan():
    order = {"order": lambda seen: seen.weights.argsort()}
    _, state = jd.monitored(SHORT, order)(JACS[0], losses=LOSSES, present=MASK)
    assert jd.read_measures(state)["order"].dtype == torch.int64


def mean_of_all(statistic):
    """Weigh all rows alike: a user's rule that knows nothing of absent objectives."""
    return torch.full((M,), 1 / M, dtype=torch.float64)


PLAIN = jd.weighted(jd.stateless("mean_of_all", mean_of_all))


@pytest.mark.parametrize(
    "wrap",
    [
        partial(jd.grouped, labels=jd.by_layer),
        jd.smoothed,
        partial(jd.every, k=2),
        partial(jd.monitored, measures={"norms": measures.row_norms}),
    ],
)
def test_rules_without_the_keyword_are_an_error(wrap):
    with pytest.raises(ValueError, match=r"`mean_of_all` must be left out: .* no keyword"):
        wrap(PLAIN)(JACS[0], present=MASK)


NAMED = {"safety": double(1.0), "speed": [double(2.0, 3.0), double(4.0)]}
NAMES = ["safety", "speed.0.0", "speed.0.1", "speed.1"]


@pytest.mark.parametrize("names", [NAMED, NAMES, tuple(NAMES)])
def test_values_are_read_by_the_names_of_the_objectives(names):
    _, state = jd.monitored(SHORT, SEEN)(JACS[0], losses=LOSSES)
    values, by_name = jd.read_measures(state), jd.read_measures(state, names=names)
    assert by_name["weights"] == dict(zip(NAMES, values["weights"], strict=True))
    assert by_name["entropy"] == values["entropy"]
    table = by_name["pairwise_cosine"]
    assert list(table) == NAMES
    for i, row in enumerate(NAMES):
        assert table[row] == dict(zip(NAMES, values["pairwise_cosine"][i], strict=True))


def test_names_of_a_vector_are_places():
    _, state = jd.monitored(SHORT, SEEN)(JACS[0], losses=LOSSES)
    assert list(jd.read_measures(state, names=LOSSES)["row_norms"]) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", ["grouped[monitored]", "grouped[rows]"])
def test_values_of_groups_are_stacked_under_each_name(name):
    seen = jd.monitored(SHORT if name == "grouped[monitored]" else ROWS, BY_ROWS)
    jac = {f"{layer}.w": leaf for layer, leaf in zip("abcd", _tree.leaves(JACS) * 1, strict=False)}
    _, state = jd.grouped(seen, jd.by_layer)(jac, losses=LOSSES)
    values, by_name = jd.read_measures(state), jd.read_measures(state, names=NAMES)
    assert values["row_norms"].shape == (4, 4)  # as many groups as objectives
    for i, key in enumerate(NAMES):
        assert torch.equal(by_name["row_norms"][key], values["row_norms"][:, i])
        cosines = by_name["pairwise_cosine"][key]
        for j, other in enumerate(NAMES):
            assert torch.equal(cosines[other], values["pairwise_cosine"][:, i, j])
    assert torch.equal(by_name["min_cosine"], values["min_cosine"])


def test_values_by_name_can_be_mapped_and_compiled():
    rule = jd.monitored(SHORT, SEEN)

    def run(jac):
        _, state = rule(jac, losses=LOSSES)
        return jd.read_measures(state, names=NAMES)

    want = _tree.stack([run(jac) for jac in JACS])
    assert_trees_close(vmap(run)(_tree.stack(JACS)), want, rtol=1e-7, atol=1e-9)
    fast, counter = compiled(run)
    assert_trees_close(_tree.stack([fast(jac) for jac in JACS]), want, rtol=1e-7, atol=1e-9)
    assert counter.graphs == 1


def test_names_have_to_differ():
    _, state = jd.monitored(SHORT, SEEN)(JACS[0], losses=LOSSES)
    with pytest.raises(ValueError, match="`names` must have distinct names"):
        jd.read_measures(state, names=["a", "b", "a", "c"])
