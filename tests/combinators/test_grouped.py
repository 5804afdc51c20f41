"""Groups of parameters that are aggregated apart."""

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import assert_same_layout, assert_trees_close, close, compiled, double
from tests.matrices import A, B, matrix
from tests.registry import METHODS, key_for, losses_for
from torchjd_func import _tree
from torchjd_func.differentiate._jacobian import rows
from torchjd_func.differentiate._request import Request
from torchjd_func.differentiate._routes import contract
from torchjd_func.differentiate._verb import linearize

PATHS = ["embedding", "encoder.bias", "encoder.weight", "head"]
LAYERS = {"": ["embedding", "head"], "encoder": ["encoder.bias", "encoder.weight"]}
STRATEGIES = {
    "by_tensor": (jd.by_tensor, {path: [path] for path in PATHS}),
    "by_layer": (jd.by_layer, LAYERS),
    "together": (jd.together, {"all": PATHS}),
}


def tree(leaves: list[Tensor]) -> dict:
    """Return a pytree of parameters, not in leaf order."""
    embedding, bias, weight, head = leaves
    return {"head": head, "encoder": {"weight": weight, "bias": bias}, "embedding": embedding}


def jacobian(m: int, seed: int = 0) -> dict:
    """Return a Jacobian whose groups conflict."""
    columns = matrix("gaussian", m, 28, seed).split([3, 5, 15, 5], dim=1)
    return tree([leaf.reshape(m, *leaf.shape[1:]) for leaf in columns])


def named(jac: dict) -> dict[str, Tensor]:
    """Return the leaves by name."""
    return dict(zip(_tree.paths(jac), _tree.leaves(jac), strict=True))


def objective(params: dict) -> Tensor:
    """Return five losses that take part in all parameters."""
    hidden = torch.tanh(
        params["encoder"]["weight"].reshape(5, 3) @ params["embedding"] + params["encoder"]["bias"]
    )
    return (params["head"] * hidden).sin().cumsum(0)


def loop(aggregator, groups: dict, jacs: list[dict], key, losses) -> list[dict]:
    """Return what the groups give one by one: the reference, by name."""
    results = [{} for _ in jacs]
    for place, group in enumerate(groups.values()):
        state = None if key is None else jd.random.fold_in(key, place)
        parts = [{path: named(jac)[path] for path in group} for jac in jacs]
        state = aggregator.init(parts[0], key=state)
        for part, result in zip(parts, results, strict=True):
            grads, state = aggregator(part, state, losses=losses)
            result.update(grads)
    return results


@pytest.mark.parametrize("route", ["jacobian", "product"])
@pytest.mark.parametrize(
    "groups", [((0, 1, 2, 3),), ((2, 1), (0, 3)), ((3,), (0,), (2,), (1,))], ids=len
)
def test_routes_serve_groups_of_leaves(route, groups):
    params = _tree.map(lambda leaf: leaf[0], jacobian(5))
    flat = _tree.leaves(rows(linearize(objective, (params,), {}, Request())))
    jacs = [torch.cat([flat[i] for i in group], dim=1) for group in groups]
    weights = matrix("gaussian", len(groups), 5)

    def run(point, weights):
        linear = linearize(objective, (point,), {}, Request(route=route))
        matrices, pullback = contract(linear, route, None, groups)
        return matrices, pullback(weights)

    matrices, grads = run(params, weights)
    assert_trees_close(matrices, torch.stack([jac @ jac.mT for jac in jacs]))
    for group, jac, row in zip(groups, jacs, weights, strict=True):
        got = torch.cat([_tree.leaves(grads)[i] for i in group])
        assert_trees_close(got, jac.mT @ row)
    assert_trees_close(compiled(run)[0](params, weights), (matrices, grads))


@pytest.mark.parametrize("small", [0, 4, 100])
def test_leaves_may_share_operations_or_not(monkeypatch, small):
    monkeypatch.setattr(_tree, "SMALL", small)
    base = matrix("gaussian", 3, 6)
    flat = [base[:, :4].reshape(3, 2, 2), base.float(), base[:, :4].reshape(3, 2, 2).cos()]
    flat += [torch.complex(base, base.sin()), base.bfloat16(), base.exp(), base.cos().float()]
    groups, weights = ((0, 4), (2,), (6, 1, 3), (5,)), matrix("gaussian", 4, 3, 1)
    blocks = _tree.blocks(flat, groups)
    want = [_tree.gramian([flat[i] for i in group]).double() for group in groups]
    assert_trees_close(_tree.gramians(blocks, groups), torch.stack(want), rtol=1e-6)
    got = _tree.weighted_sums(blocks, groups, weights, flat)
    for group, row in zip(groups, weights, strict=True):
        for i in group:
            rtol = 1e-2 if flat[i].dtype == torch.bfloat16 else 1e-5
            assert_trees_close(got[i], _tree.weighted_sum(flat[i], row), rtol=rtol)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", METHODS)
def test_grouped_equals_a_loop_over_groups(name, strategy):
    method, (labels, groups) = METHODS[name], STRATEGIES[strategy]
    m = max(3, method.min_m)
    jacs = [jacobian(m, seed) for seed in range(3)]
    key, losses, inner = key_for(method), losses_for(method, m), method.make(m)
    rule = jd.grouped(inner, labels)
    state = rule.init(jacs[0], key=key)
    for jac, want in zip(jacs, loop(inner, groups, jacs, key, losses), strict=True):
        before = state
        got, state = rule(jac, state, losses=losses)
        assert_trees_close(named(got), want, rtol=1e-7, atol=1e-9)
        assert_same_layout(state, before)


@pytest.mark.parametrize("route", ["jacobian", "product"])
@pytest.mark.parametrize("name", METHODS)
def test_gramian_route_equals_jacobian_route_by_group(name, route):
    method = METHODS[name]
    m = max(3, method.min_m)
    jac, losses = jacobian(m), losses_for(method, m)
    rule = jd.grouped(method.make(m), jd.by_layer)
    offset = torch.zeros(m, dtype=torch.float64) if losses is None else losses
    start = _tree.map(lambda leaf: torch.zeros_like(leaf[0]), jac)

    def fn(params):
        shares = _tree.map(lambda row, x: (row * x).sum(-1), jac, params)
        return offset + sum(_tree.leaves(shares))

    state = want_state = jd.init_state(rule, fn, start, key=key_for(method))
    for _ in range(2):
        got, state = jd.grad(fn, rule, route=route)(state, start)
        want, want_state = rule(jac, want_state, losses=losses)
        assert_trees_close((got, state), (want, want_state), rtol=1e-7, atol=1e-9)


def mixture() -> jd.Aggregator:
    """Return a different method for each tensor, one of which needs the rows."""
    shared = jd.gradvac()
    methods = {"head": shared, "embedding": jd.moco(), "encoder.bias": jd.mgda()}
    return jd.grouped({**methods, "encoder.weight": shared}, jd.by_tensor)


RULES = {
    "upgrad": (jd.grouped(jd.upgrad(), jd.by_tensor), None),
    "gradvac": (jd.grouped(jd.gradvac(), jd.by_layer), jd.random.key(0)),
    "dict": (
        jd.grouped({"": jd.nash_mtl(), "encoder": jd.smoothed(jd.mgda())}, jd.by_layer),
        None,
    ),
    "rows": (jd.grouped(jd.graddrop(), jd.by_tensor), jd.random.key(0)),
    "mixture": (mixture(), jd.random.key(0)),
    "pytree": (
        jd.grouped(jd.pcgrad(), {"encoder": 0, "head": 1, "embedding": 0}),
        jd.random.key(0),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_grouped_steps_are_one_graph(name):
    rule, key = RULES[name]
    params = _tree.map(lambda leaf: leaf[0], jacobian(5))
    state = jd.init_state(rule, objective, params, key=key)

    def step(state, params):
        grads, losses, state = jd.grad_and_value(objective, rule)(state, params)
        return _tree.map(lambda x, g: x - 0.1 * g, params, grads), losses, state

    fast, counter = compiled(step)
    eager = got = (params, None, state)
    for _ in range(3):
        eager, got = step(eager[2], eager[0]), fast(got[2], got[0])
        assert_trees_close(got, eager, rtol=1e-7, atol=1e-9)
    assert counter.graphs == 1


@pytest.mark.parametrize("name", RULES)
def test_grouped_can_be_mapped(name):
    rule, _ = RULES[name]
    models = [_tree.map(lambda leaf: leaf[0], jacobian(5, seed)) for seed in range(3)]
    keys = jd.random.split(jd.random.key(1), 3)

    def two_steps(params, key):
        state = jd.init_state(rule, objective, params, key=key)
        first, state = jd.grad(objective, rule)(state, params)
        return first, *jd.grad(objective, rule)(state, params)

    want = _tree.stack([two_steps(*pair) for pair in zip(models, keys, strict=True)])
    assert_trees_close(vmap(two_steps)(_tree.stack(models), keys), want, rtol=1e-7, atol=1e-9)


def test_each_label_has_its_method():
    rule, jac = mixture(), jacobian(3)
    got, state = rule(jac, rule.init(jac, key=jd.random.key(0)))
    assert_trees_close(named(got)["encoder.bias"], jd.mgda()(named(jac)["encoder.bias"])[0])
    assert_trees_close(named(got)["embedding"], jd.moco()(named(jac)["embedding"])[0])
    shared, moco, mgda = state.inner
    assert shared.phi.shape == (2, 3, 3)
    assert (len(moco.states), mgda) == (1, ())


def test_values_of_gradient_vaccine():
    jac = {"a": A[:, :1], "b": A[:, 1:]}
    for labels, want in (
        (jd.together, [0.58479533, 3.80116959, 3.80116959]),
        (jd.by_tensor, [0.0, 2.0, 2.0]),
    ):
        rule = jd.grouped(jd.gradvac(), labels)
        got, _ = rule(jac, rule.init(jac, key=jd.random.key(0)))
        close(torch.cat([got["a"], got["b"]]), want, atol=1e-8)


@pytest.mark.parametrize(
    ("strategy", "groups"),
    [(jd.together, 1), (jd.by_network, 2), (jd.by_layer, 3), (jd.by_tensor, 5)],
)
def test_the_four_groupings_keep_one_average_for_each_group(strategy, groups):
    names = ["enc.0.weight", "enc.0.bias", "enc.1.weight", "enc.1.bias", "dec.weight"]
    jacs = [
        dict(zip(names, matrix("gaussian", 3, 10, seed).split(2, dim=1), strict=True))
        for seed in range(3)
    ]
    rule, key = jd.grouped(jd.gradvac(), strategy), jd.random.key(0)
    state = rule.init(jacs[0], key=key)
    members: dict[str, list[str]] = {}
    for name in sorted(names):
        members.setdefault(strategy(name), []).append(name)
    for jac in jacs:
        _, state = rule(jac, state)
    assert state.inner[0].phi.shape == (groups, 3, 3)
    for place, group in enumerate(members.values()):
        own = jd.gradvac().init(jacs[0]["dec.weight"], key=jd.random.fold_in(key, place))
        for jac in jacs:
            _, own = jd.gradvac()(torch.cat([jac[name] for name in group], dim=1), own)
        close(state.inner[0].phi[place], own.phi, atol=1e-9)


def test_pytrees_of_labels_broadcast():
    jac = jacobian(3)
    deep = {"encoder": {"weight": "a", "bias": "b"}, "head": "b", "embedding": "a"}
    want = jd.grouped(jd.upgrad(), lambda path: {"encoder.weight": "a", "embedding": "a"}.get(path))
    assert_trees_close(jd.grouped(jd.upgrad(), deep)(jac), want(jac))
    prefix = {"encoder": 0, "head": 1, "embedding": 1}
    assert_trees_close(
        jd.grouped(jd.upgrad(), prefix)(jac)[0], jd.grouped(jd.upgrad(), jd.by_layer)(jac)[0]
    )
    assert_trees_close(jd.grouped(jd.upgrad(), {"": "all"})(jac)[0], jd.upgrad()(jac)[0])
    flat = named(jac)
    assert_trees_close(
        jd.grouped(jd.upgrad(), prefix)(flat)[0], named(jd.grouped(jd.upgrad(), prefix)(jac)[0])
    )


def test_groups_nest():
    jac = jacobian(3)
    inner = jd.grouped(jd.upgrad(), jd.by_tensor)
    rule = jd.grouped({"encoder": inner, "": jd.mgda()}, jd.by_layer)
    want = dict(named(inner(jac)[0]))
    want.update(jd.mgda()({path: named(jac)[path] for path in LAYERS[""]})[0])
    assert_trees_close(named(rule(jac)[0]), want)


def test_one_matrix_is_one_group():
    for labels in (jd.together, jd.by_network, jd.by_layer, jd.by_tensor):
        assert_trees_close(jd.grouped(jd.upgrad(), labels)(B)[0], jd.upgrad()(B)[0])


def test_methods_of_one_object_share_a_solve():
    calls = []

    def counted(gramian):
        calls.append(gramian.shape)
        return gramian.new_ones(gramian.shape[:1])

    method = jd.weighted(jd.stateless("counted", counted))
    jd.grouped({path: method for path in PATHS}, jd.by_tensor)(jacobian(3))
    assert calls == [(3, 3)]


def test_grouping_of_multitask_shared_parameters():
    heads = {"a": lambda p, z, batch: (p * z).sum(), "b": lambda p, z, batch: -z.square().sum()}
    task = jd.multitask(lambda p, x: torch.tanh(x @ p["w"]) + p["b"], heads)
    shared = {"w": matrix("gaussian", 3, 2), "b": double(0.1, 0.2)}
    params, batch = (shared, {"a": double(1.0, 2.0), "b": {}}), matrix("gaussian", 4, 3, 1)
    rule = jd.grouped(jd.upgrad(), jd.by_tensor)
    (got, _), _ = jd.grad(task, rule)(None, params, batch)
    assert_trees_close(got, rule(jd.jac(task)(params, batch))[0])


ERRORS = {
    "no aggregator": (lambda: jd.grouped(jd.upgrad, jd.by_tensor), TypeError, "aggregator"),  # pyright: ignore
    "no aggregators": (lambda: jd.grouped({}, jd.by_tensor), TypeError, "aggregator"),
    "a weighting": (
        lambda: jd.grouped({"head": jd.upgrad().weighting}, jd.by_tensor),  # pyright: ignore
        TypeError,
        "grouped",
    ),
    "unknown label": (
        lambda: jd.grouped({"head": jd.upgrad()}, jd.by_network)(jacobian(3)),
        ValueError,
        "embedding",
    ),
    "unused label": (
        lambda: jd.grouped({"all": jd.upgrad(), "typo": jd.mgda()}, jd.together)(jacobian(3)),
        ValueError,
        "typo",
    ),
    "unlabelled parameter": (
        lambda: jd.grouped(jd.upgrad(), {"head": 0, "encoder": 1})(jacobian(3)),
        ValueError,
        "embedding",
    ),
    "labels too deep": (
        lambda: jd.grouped(jd.upgrad(), {"head": {"a": 0}, "encoder": 1, "embedding": 0})(
            jacobian(3)
        ),
        ValueError,
        "head",
    ),
    "label that cannot be hashed": (
        lambda: jd.grouped(jd.upgrad(), lambda path: [path])(jacobian(3)),  # pyright: ignore
        TypeError,
        "hashable",
    ),
    "two of one name": (
        lambda: jd.grouped(jd.upgrad(), jd.by_tensor)({"a.b": A, "a": {"b": A}}),
        ValueError,
        r"a\.b",
    ),
    "state of another method": (
        lambda: jd.grouped(jd.upgrad(), jd.by_tensor)(jacobian(3), ()),
        ValueError,
        "GroupedState",
    ),
    "state of another grouping": (
        lambda: jd.grouped(jd.smoothed(jd.upgrad()), jd.by_tensor)(
            jacobian(3), jd.grouped(jd.smoothed(jd.upgrad()), jd.by_layer).init(jacobian(3))
        ),
        ValueError,
        "4 parts",
    ),
    "rows state of another grouping": (
        lambda: jd.grouped(jd.moco(), jd.by_tensor)(
            jacobian(3), jd.grouped(jd.moco(), jd.by_layer).init(jacobian(3))
        ),
        ValueError,
        "4 parts",
    ),
    "smoothed outside": (
        lambda: jd.smoothed(jd.grouped(jd.upgrad(), jd.by_tensor)),
        ValueError,
        r"inside jd\.grouped",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_fault(name):
    call, kind, match = ERRORS[name]
    with pytest.raises(kind, match=match):
        call()
