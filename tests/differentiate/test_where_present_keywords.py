"""`where=`, `present=`, `size=` and keyword arguments: every verb, objective and route."""

import functools

import pytest
import torch
from torch import nn
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.differentiate.objectives import (
    HEADS,
    MULTITASK,
    MULTITASK_PARAMS,
    OBJECTIVES,
    PARAMS,
    ROUTES,
    RULE,
    X,
    inverse,
    outputs,
    tree_losses,
    vector_losses,
)
from tests.helpers import assert_trees_close, compiled
from torchjd_func import _tree

every_objective = pytest.mark.parametrize("fn", OBJECTIVES.values(), ids=OBJECTIVES)
every_route = pytest.mark.parametrize("route", ROUTES)


def last(path):
    return path == "last"


def rows_of(fn):
    return oracles.jacobian_by_loops(lambda p, x: _tree.ravel(fn(p, x)), PARAMS, X)


def weighted(rows, weights):
    return {name: torch.tensordot(weights, leaf, 1) for name, leaf in rows.items()}


def shared_rows():
    def whole(shared, x):
        return _tree.ravel(MULTITASK((shared, MULTITASK_PARAMS[1]), x))

    return oracles.jacobian_by_loops(whole, PARAMS, X)


class TestWhere:
    @every_objective
    @every_route
    def test_of_every_verb(self, fn, route):
        rows = rows_of(fn)
        some = {"first": None, "last": rows["last"]}
        options = {"route": route, "where": last}
        want = _tree.gramian(some)
        got = jd.gramian(fn, **options)(PARAMS, X)
        torch.testing.assert_close(got, want)
        assert_trees_close(jd.gramian_and_value(fn, **options)(PARAMS, X)[0], want, rtol=1e-7)
        crossed = jd.cross_gramian(fn, **options)(PARAMS, (X,), (X,))
        torch.testing.assert_close(crossed, want)
        losses, matrix, vjp_fn = jd.gramian_vjp(fn, PARAMS, X, **options)
        torch.testing.assert_close(matrix, want)
        weights = torch.linspace(-1, 1, len(want), dtype=torch.float64)
        assert_trees_close(vjp_fn(weights), weighted(rows, weights))
        grads, values, _ = jd.grad_and_value(fn, RULE, **options)(None, PARAMS, X)
        assert_trees_close(grads, weighted(rows, inverse(want)), rtol=1e-7)
        assert_trees_close((losses, values), (fn(PARAMS, X), fn(PARAMS, X)))

    @every_objective
    def test_of_the_jacobian(self, fn):
        rows = rows_of(fn)
        got, losses = jd.jac_and_value(fn, where=last)(PARAMS, X)
        assert got["first"] is None
        assert_trees_close(got["last"], rows["last"])
        assert_trees_close(losses, fn(PARAMS, X))

    @every_route
    def test_of_tasks(self, route):
        rows = shared_rows()
        matrix = _tree.gramian(rows["last"])
        got = jd.gramian(MULTITASK, route=route, where=last)(MULTITASK_PARAMS, X)
        torch.testing.assert_close(got, matrix)
        assert jd.jac(MULTITASK, where=last)(MULTITASK_PARAMS, X)["first"] is None
        step = jd.grad(MULTITASK, RULE, route=route, where=last)
        (shared, heads), _ = step(None, MULTITASK_PARAMS, X)
        assert_trees_close(shared, weighted(rows, inverse(matrix)), rtol=1e-7)
        (_, want), _ = jd.grad(MULTITASK, RULE)(None, MULTITASK_PARAMS, X)
        assert_trees_close(heads, want)

    def test_compiles_and_maps(self):
        for fn, params in ((tree_losses, PARAMS), (MULTITASK, MULTITASK_PARAMS)):
            step = jd.grad(fn, RULE, where=last)
            fast, counter = compiled(step)
            assert_trees_close(fast(None, params, X), step(None, params, X))
            assert counter.graphs == 1
            mapped = vmap(lambda x, step=step, p=params: step(None, p, x)[0])(torch.stack([X, -X]))
            want = [step(None, params, x)[0] for x in (X, -X)]
            assert_trees_close(mapped, _tree.stack(want))


class Passes(torch.autograd.Function):
    """The identity, counting how often it is pulled back through."""

    count = 0
    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        Passes.count += 1
        return grads[0]

    @staticmethod
    def vmap(info, in_dims, *args):
        return args[0].clone(), in_dims[0]


class TestFeatures:
    def test_weights_come_from_the_gradients_by_the_features(self):
        z = outputs(PARAMS, X)

        def of_features(z):
            named = {name: head(MULTITASK_PARAMS[1][name], z, X) for name, head in HEADS.items()}
            return _tree.ravel(named)

        by_features = torch.autograd.functional.jacobian(of_features, z).flatten(1)
        step = jd.grad_and_value(MULTITASK, RULE, where=jd.features)
        (shared, heads), losses, _ = step(None, MULTITASK_PARAMS, X)
        weights = inverse(by_features @ by_features.mT)
        assert_trees_close(shared, weighted(shared_rows(), weights))
        assert_trees_close(losses, MULTITASK(MULTITASK_PARAMS, X))
        assert_trees_close(heads, jd.grad(MULTITASK, RULE)(None, MULTITASK_PARAMS, X)[0][1])
        fast, _ = compiled(step)
        assert_trees_close(fast(None, MULTITASK_PARAMS, X)[0], (shared, heads))

    def test_one_pass_goes_through_the_trunk(self):
        def trunk(shared, x):
            return outputs({**shared, "first": Passes.apply(shared["first"])}, x)

        objective = jd.multitask(trunk, HEADS)
        counts = {}
        for where in (jd.features, None):
            Passes.count = 0
            jd.grad(objective, RULE, chunk_size=1, where=where)(None, MULTITASK_PARAMS, X)
            counts[where] = Passes.count
        assert counts == {jd.features: 1, None: 3}

    def test_of_microbatches(self):
        parts = jd.accumulate(MULTITASK, 2)
        step = jd.grad(parts, RULE, where=jd.features)
        whole = jd.grad(MULTITASK, RULE, where=jd.features)
        # Features of examples are rows of z: those of all microbatches are those of the batch.
        got, want = step(None, MULTITASK_PARAMS, X), whole(None, MULTITASK_PARAMS, X)
        assert_trees_close(got, want)


class TestSeveralLossesOfAHead:
    def test_heads_add_up_or_follow_the_weights(self):
        losses = MULTITASK(MULTITASK_PARAMS, X)
        assert sorted(losses["one"]) == ["entropy", "policy"]
        (_, heads), _ = jd.grad(MULTITASK, RULE)(None, MULTITASK_PARAMS, X)
        total = torch.func.grad(lambda p: _tree.ravel(MULTITASK(p, X)).sum())(MULTITASK_PARAMS)
        assert_trees_close(heads, total[1])
        scaled = jd.multitask(MULTITASK.trunk, HEADS, scale_heads=True)
        (_, heads), _ = jd.grad(scaled, RULE)(None, MULTITASK_PARAMS, X)
        weights = inverse(jd.gramian(MULTITASK)(MULTITASK_PARAMS, X))
        total = torch.func.grad(lambda p: _tree.ravel(MULTITASK(p, X)) @ weights)(MULTITASK_PARAMS)
        assert_trees_close(heads, total[1])


def mask_of(m):
    mask = torch.ones(m, dtype=torch.bool)
    mask[1] = False
    return mask


class TestPresent:
    @every_objective
    @every_route
    def test_equals_the_present_rows(self, fn, route):
        rows = rows_of(fn)
        m = len(rows["last"])
        mask = mask_of(m)
        kept = _tree.map(lambda leaf: torch.where(_tree.per_row(mask, leaf), leaf, 0), rows)
        want = _tree.gramian(kept)
        options = {"route": route}
        got = jd.gramian(fn, **options)(PARAMS, X, present=mask)
        torch.testing.assert_close(got, want)
        weights = inverse(want, mask)
        step = jd.grad_and_value(fn, RULE, **options)
        grads, losses, _ = step(None, PARAMS, X, present=mask)
        assert_trees_close(grads, weighted(rows, weights), rtol=1e-7)
        assert_trees_close(losses, fn(PARAMS, X))
        flags = mask.tolist()
        assert_trees_close(step(None, PARAMS, X, present=flags)[0], grads, rtol=1e-12)
        assert_trees_close(jd.jac(fn)(PARAMS, X, present=mask), kept)
        crossed = jd.cross_gramian(fn, **options)(PARAMS, (X,), (X,), present=mask)
        torch.testing.assert_close(crossed, want)
        _, matrix, _ = jd.gramian_vjp(fn, PARAMS, X, present=mask, **options)
        torch.testing.assert_close(matrix, want)
        for nothing in (torch.zeros_like(mask), [False] * m):
            assert not _tree.ravel(step(None, PARAMS, X, present=nothing)[0]).any()

    @pytest.mark.parametrize("known", [False, True], ids=["tensors", "bools"])
    def test_a_loss_that_is_not_a_number(self, known):
        def losses(params, x):
            found = tree_losses(params, x)
            empty = outputs(params, x)[:0, 0].mean()  # 0 / 0
            ill = found["c"] * torch.tensor(torch.nan)
            return {**found, "b": ill if known else empty}

        present = {"a": True, "b": False, "c": True}
        if not known:
            present = {name: torch.tensor(flag) for name, flag in present.items()}
        want = jd.grad(lambda p, x: _tree.ravel(tree_losses(p, x))[[0, 2]], RULE)(None, PARAMS, X)
        for route in ROUTES:
            step = jd.grad_and_value(losses, RULE, route=route)
            grads, found, _ = step(None, PARAMS, X, present=present)
            assert_trees_close(grads, want[0])
            assert found["b"].isnan()

    @pytest.mark.parametrize("task", [False, True], ids=["function", "multitask"])
    def test_bools_by_name_are_one_graph(self, task):
        fn, params = (MULTITASK, MULTITASK_PARAMS) if task else (tree_losses, PARAMS)
        names = ["one", "two"] if task else ["a", "b", "c"]
        step, present = jd.grad(fn, RULE), dict.fromkeys(names, True) | {names[1]: False}
        present = {**present, "one": {"policy": True, "entropy": True}} if task else present
        fast, _ = compiled(lambda params, x: step(None, params, x, present=present))
        assert_trees_close(fast(params, X), step(None, params, X, present=present))

    @pytest.mark.parametrize("name", ["instancewise", "per_example"])
    def test_an_example_that_is_not_a_number(self, name):
        fn, x, mask = OBJECTIVES[name], X.clone(), mask_of(len(X))
        x[1] = torch.nan
        want = jd.grad(fn, RULE)(None, PARAMS, X, present=mask)
        assert_trees_close(jd.grad(fn, RULE)(None, PARAMS, x, present=mask), want)

    def test_absent_tasks_have_no_gradient_or_zeros(self):
        params, calls = MULTITASK_PARAMS, []

        def never(p, z, x):
            calls.append(1)
            return (z @ p["w"]).square().mean()

        objective = jd.multitask(MULTITASK.trunk, {**HEADS, "two": never})
        flags = {"one": {"policy": True, "entropy": True}, "two": False}
        step = jd.grad_and_value(objective, RULE)
        (shared, heads), losses, _ = step(None, params, X, present=flags)
        assert not calls, "it is not run"
        assert heads["two"] == {"w": None}
        assert losses["two"].isnan()
        tensors = _tree.map(torch.tensor, flags)
        (again, zeros), _, _ = step(None, params, X, present=tensors)
        assert_trees_close(again, shared)
        assert_trees_close(zeros["one"], heads["one"])
        assert not zeros["two"]["w"].any()
        vector = torch.tensor([True, True, False])
        assert_trees_close(step(None, params, X, present=vector)[0], (again, zeros))
        alone = jd.multitask(MULTITASK.trunk, {"one": HEADS["one"]})
        (want, _), _ = jd.grad(alone, RULE)(None, (PARAMS, {"one": params[1]["one"]}), X)
        assert_trees_close(shared, want)
        parts = jd.grad(jd.accumulate(objective, 2), RULE)
        assert parts(None, params, X, present=flags)[0][1]["two"] == {"w": None}

    def test_optimizers_skip_what_has_no_gradient(self):
        head = nn.Linear(2, 1, bias=False)
        weight = head.weight.detach().clone()
        objective = jd.multitask(
            lambda shared, x: outputs(shared, x.double()),
            {
                "a": lambda p, z, x: z.mean(),
                "b": lambda p, z, x: (z.float() @ p["weight"].mT).mean(),
            },
        )
        params = (PARAMS, {"a": {}, "b": {"weight": head.weight}})
        (_, grads), _ = jd.grad(objective, RULE)(None, params, X, present={"a": True, "b": False})
        head.weight.grad = grads["b"]["weight"]
        torch.optim.AdamW(head.parameters(), weight_decay=0.5).step()
        torch.testing.assert_close(head.weight.detach(), weight, rtol=0, atol=0)

    def test_compiles_and_maps(self):
        masks = torch.tensor([[True, False, True], [False, True, True], [False] * 3])
        for fn, params in ((tree_losses, PARAMS), (MULTITASK, MULTITASK_PARAMS)):
            step = jd.grad(fn, RULE)

            def run(mask, step=step, params=params):
                return step(None, params, X, present=mask)[0]

            fast, counter = compiled(run)
            want = [run(mask) for mask in masks]
            for mask, expected in zip(masks, want, strict=True):
                assert_trees_close(fast(mask), expected)
            assert counter.graphs == 1
            assert_trees_close(vmap(run)(masks), _tree.stack(want))

    def test_two_batches(self):
        rule = jd.Weighting(
            "inverse", lambda statistic, key: (), _inverse_update, needs="cross_gramian"
        )
        step = jd.double_sampling(tree_losses, rule)
        mask = mask_of(3)
        grads, _, _ = step(None, PARAMS, (X,), (X,), present=mask)
        assert_trees_close(grads, jd.grad(tree_losses, RULE)(None, PARAMS, X, present=mask)[0])


def _inverse_update(statistic, state, losses, present=None):
    return inverse(statistic, present), state


class TestKeywords:
    @pytest.mark.parametrize(
        "name", ["tree", "instancewise", "per_example", "accumulate", "scaled"]
    )
    def test_go_to_the_objective(self, name):
        fn = OBJECTIVES[name]
        want = jd.grad_and_value(fn, RULE)(None, PARAMS, X)
        assert_trees_close(jd.grad_and_value(fn, RULE)(None, PARAMS, x=X), want)
        assert_trees_close(jd.jac(fn)(PARAMS, x=X), jd.jac(fn)(PARAMS, X))
        assert_trees_close(fn(PARAMS, x=X), fn(PARAMS, X))

    @pytest.mark.parametrize("name", ["state", "params", "fn", "rule", "args", "key", "batch_1"])
    def test_may_have_the_names_of_the_arguments_of_steps(self, name):
        def fn(weights, x, **named):
            return tree_losses(weights, x + named[name])

        moved, named = functools.partial(fn, **{name: 0.5}), {name: 0.5}
        for make in (jd.grad, jd.grad_and_value):
            want = make(moved, RULE)(None, PARAMS, X)
            assert_trees_close(make(fn, RULE)(None, PARAMS, X, **named), want)
        for make in (jd.jac, jd.gramian):
            assert_trees_close(make(fn)(PARAMS, X, **named), make(moved)(PARAMS, X))
        step = jd.double_sampling(fn, jd.modo())
        want = jd.double_sampling(moved, jd.modo())(None, PARAMS, (X,), (X + 1,))
        assert_trees_close(step(None, PARAMS, (X,), (X + 1,), **named), want)

    def test_flags_and_shared_numbers(self):
        def loss(params, x, *, power, scale):
            return scale * outputs(params, x).square().sum(-1) ** power

        scale = torch.tensor(2.0, dtype=torch.float64)
        for make in (jd.instancewise, jd.per_example):
            objective = make(loss)
            bound = make(functools.partial(loss, power=1, scale=scale))
            got = jd.grad_and_value(objective, RULE)(None, PARAMS, X, power=1, scale=scale)
            assert_trees_close(got, jd.grad_and_value(bound, RULE)(None, PARAMS, X))

    def test_of_tasks(self):
        def trunk(shared, batch, *, bias=0.0):
            return outputs(shared, batch) + bias

        heads = {"a": lambda p, z, batch, bias=0.0: (z * p + bias).square().mean()}
        objective = jd.multitask(trunk, heads)
        params = (PARAMS, {"a": torch.tensor(0.5, dtype=torch.float64)})
        step = jd.grad(objective, RULE)
        assert_trees_close(step(None, params, batch=X), step(None, params, X))
        fixed = jd.multitask(
            functools.partial(trunk, bias=1.0), {"a": functools.partial(heads["a"], bias=1.0)}
        )
        assert_trees_close(step(None, params, X, bias=1.0), jd.grad(fixed, RULE)(None, params, X))

    def test_plans_are_kept_by_name(self):
        objective = jd.instancewise(lambda p, x, y, z: (outputs(p, x) * y).sum(-1) + z.sum(-1) * 0)
        calls = []
        y = torch.ones(6, 2, dtype=torch.float64)
        for args, kwargs in (((X, y), {"z": 3 * y}), ((X,), {"z": 3 * y, "y": 2 * y})) * 2:
            got = jd.gramian(objective)(PARAMS, *args, **kwargs)
            want = jd.gramian(objective, route="jacobian")(PARAMS, *args, **kwargs)
            torch.testing.assert_close(got, want)
            calls.append(got)
        torch.testing.assert_close(calls[0], calls[2])


class TestSize:
    def test_is_for_several_processes(self):
        for size in (3, torch.tensor(3)):
            with pytest.raises(ValueError, match=r"`size` must be left out .*data_parallel"):
                jd.jac(vector_losses)(PARAMS, X, size=size)
        for size in (-1, 0.5, True, torch.ones(2)):
            with pytest.raises(ValueError, match=r"`size` must be an int of at least 0"):
                jd.grad(vector_losses, RULE)(None, PARAMS, X, size=size)


def test_plans_are_proven_where_losses_are_absent():
    def mixed(params, x):
        scores = x @ params
        return (scores - scores.mean()).square()

    params, x = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    present = torch.tensor([True, False, True, True])
    with pytest.warns(UserWarning, match="losses depend on other examples"):
        got = jd.gramian(jd.instancewise(mixed))(params, x, present=present)
    torch.testing.assert_close(got, jd.gramian(mixed)(params, x, present=present))
