"""Several batches, microbatches, parts of parameters or of objectives: against plain loops."""

import pytest
import torch
from torch import nn
from torch.func import vmap

import torchjd_func as jd
from tests import oracles
from tests.helpers import assert_differentiable, assert_trees_close, compiled, weighting
from torchjd_func import _tree

GENERATOR = torch.Generator().manual_seed(0)
PARAMS = {
    "first": torch.randn(3, 4, dtype=torch.float64, generator=GENERATOR),
    "last": torch.randn(4, 2, dtype=torch.float64, generator=GENERATOR),
}
X1, X2, X3 = (torch.randn(6, 3, dtype=torch.float64, generator=GENERATOR) for _ in range(3))
ROUTES = ["auto", "jacobian", "layerwise", "product"]
every_route = pytest.mark.parametrize("route", ROUTES)


def losses_of(params, x):
    out = ((x @ params["first"]).tanh() @ params["last"]).square().mean(0)
    return {"b": out[0], "a": out[1] + params["last"].sum()}


def vector_of_losses(params, x):
    return _tree.ravel(losses_of(params, x))


def instance_losses(params, x):
    return ((x @ params["first"]).tanh() @ params["last"]).square().sum(1)


def with_aux(params, x):
    return losses_of(params, x), {"mean": x.mean(0)}


def rows_of(x):
    return oracles.jacobian_by_loops(vector_of_losses, PARAMS, x)


def weighted(rows, weights):
    return {name: torch.tensordot(weights, leaf, 1) for name, leaf in rows.items()}


class TestDoubleSampling:
    @every_route
    @pytest.mark.parametrize("rule", [jd.modo(), jd.sdmgrad()], ids=repr)
    @pytest.mark.parametrize("third", [None, (X3,)], ids=["two", "three"])
    def test_equals_the_definition(self, route, rule, third):
        step = jd.double_sampling(losses_of, rule, route=route)
        state = wanted_state = rule.init(torch.eye(2, dtype=torch.float64))
        jacs = [rows_of(x) for x in (X1, X2, X3)]
        for _ in range(3):
            grads, losses, state = step(state, PARAMS, (X1,), (X2,), third)
            weights, wanted_state = rule(_tree.cross_gramian(*jacs[:2]), wanted_state)
            followed = _tree.mean(jacs[:2]) if third is None else jacs[2]
            assert_trees_close(grads, weighted(followed, weights))
            xs = (X1, X2) if third is None else (X3,)
            assert_trees_close(losses, _tree.mean([losses_of(PARAMS, x) for x in xs]))
            assert_trees_close(state, wanted_state)

    def test_each_batch_is_run_once(self):
        calls = []

        def counted(params, x):
            calls.append(x)
            return losses_of(params, x)

        jd.double_sampling(counted, jd.modo())(None, PARAMS, (X1,), (X2,), (X3,))
        assert len(calls) == 3

    def test_auxiliary_output(self):
        step = jd.double_sampling(with_aux, jd.modo(), has_aux=True)
        grads, (losses, aux), _ = step(None, PARAMS, (X1,), (X2,), (X3,))
        want, plain, _ = jd.double_sampling(losses_of, jd.modo())(None, PARAMS, (X1,), (X2,), (X3,))
        assert_trees_close((grads, losses), (want, plain))
        assert_trees_close(aux, tuple(with_aux(PARAMS, x)[1] for x in (X1, X2, X3)))

    def test_multitask_gives_mean_gradients_of_heads(self):
        objective, params = small_multitask(), multitask_params()
        step = jd.double_sampling(objective, jd.modo())
        (shared, heads), _, _ = step(None, params, (X1,), (X2,))
        parts = [jd.grad(objective, jd.sum())(None, params, x)[0] for x in (X1, X2)]
        assert_trees_close(heads, _tree.mean([part[1] for part in parts]))
        cross = jd.cross_gramian(objective)(params, (X1,), (X2,))
        jacs = [jd.jac(objective)(params, x) for x in (X1, X2)]
        want = _tree.weighted_sum(_tree.mean(jacs), jd.modo()(cross)[0])
        assert_trees_close(shared, want)

    def test_compiles_and_maps(self):
        step = jd.double_sampling(losses_of, jd.sdmgrad())
        state = jd.init_state(jd.sdmgrad(), losses_of, PARAMS, X1)
        assert_trees_close(state, jd.sdmgrad().init(jd.gramian(losses_of)(PARAMS, X1)))
        fast, counter = compiled(step)
        for third in (None, (X3,)):
            want = step(state, PARAMS, (X1,), (X2,), third)
            assert_trees_close(fast(state, PARAMS, (X1,), (X2,), third), want)
        assert counter.graphs == 2
        seconds = torch.stack([X2, X3])
        mapped = vmap(lambda x: step(state, PARAMS, (X1,), (x,))[0])(seconds)
        want = _tree.stack([step(state, PARAMS, (X1,), (x,))[0] for x in seconds])
        assert_trees_close(mapped, want)

    def test_is_unbiased_where_one_batch_is_not(self):
        """The mean over all pairs of examples is the Gramian of the whole data."""
        single = [(X1[i : i + 1],) for i in range(6)]
        cross = jd.cross_gramian(vector_of_losses)
        pairs = [cross(PARAMS, a, b) for a in single for b in single]
        torch.testing.assert_close(_tree.mean(pairs), jd.gramian(losses_of)(PARAMS, X1))


def small_multitask(**options):
    return jd.multitask(
        lambda shared, x: {"h": (x @ shared["first"]).tanh(), "x": x * shared["scale"]},
        {
            "one": lambda p, z, x: (z["h"] @ p["w"]).square().mean(),
            "two": lambda p, z, x: (z["x"].sum(1) - p).square().mean(),
            "bare": lambda p, z, x: z["h"].mean() + z["x"].square().mean(),
        },
        **options,
    )


def multitask_params():
    shared = {"first": PARAMS["first"], "scale": torch.ones(3, dtype=torch.float64)}
    heads = {
        "two": torch.tensor(0.5, dtype=torch.float64),
        "one": {"w": torch.ones(4, 2, dtype=torch.float64)},
        "bare": {},
    }
    return shared, heads


class TestMultitask:
    @every_route
    def test_features_that_tasks_share_in_part(self, route):
        objective, params = small_multitask(), multitask_params()

        def whole(shared, x):
            return _tree.ravel(objective((shared, params[1]), x))

        want = oracles.jacobian_by_loops(whole, params[0], X1)
        assert_trees_close(jd.jac(objective)(params, X1), want)
        gramian = jd.gramian(objective, route=route)(params, X1)
        torch.testing.assert_close(gramian, _tree.gramian(want))

    @every_route
    @pytest.mark.parametrize("scale_heads", [False, True])
    def test_heads_follow_the_weighted_losses_if_declared(self, route, scale_heads):
        objective, params = small_multitask(scale_heads=scale_heads), multitask_params()
        step = jd.grad_and_value(objective, jd.mgda(), route=route)
        (shared, heads), _, _ = step(None, params, X1)
        weights, _ = weighting(jd.mgda())(jd.gramian(objective)(params, X1))
        scales = weights if scale_heads else torch.ones_like(weights)
        total = torch.func.grad(lambda p: _tree.ravel(objective(p, X1)) @ scales)(params)
        assert_trees_close(heads, total[1])
        weighted_total = torch.func.grad(lambda p: _tree.ravel(objective(p, X1)) @ weights)(params)
        assert_trees_close(shared, weighted_total[0])
        _, _, vjp_fn = jd.gramian_vjp(objective, params, X1, route=route)
        assert_trees_close(vjp_fn(weights), (shared, heads))

    @every_route
    def test_a_complex_parameter_beside_real_ones(self, route):
        def trunk(w, x):
            return (x @ w["weight"] + w["bias"].real).tanh()

        weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
        shared = {"bias": torch.ones(4, dtype=torch.complex128), "weight": weight}
        heads = {"a": lambda p, z, x: (z @ p).mean(), "b": lambda p, z, x: z.square().mean()}
        params = shared, {"a": torch.ones(4).double(), "b": {}}
        objective = jd.multitask(trunk, heads)
        rule = jd.graddrop()
        state = jd.init_state(rule, objective, params, X1, key=jd.random.key(0))
        (grads, _), _ = jd.grad(objective, rule, route=route)(state, params, X1)
        assert_trees_close(rule(jd.jac(objective)(params, X1), state)[0], grads)

    def test_frozen_parts_are_closed_over(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        apply, params, buffers = jd.functionalize(model)
        frozen = {name: leaf for name, leaf in params.items() if name.startswith("0.")}
        tuned = {name: leaf for name, leaf in params.items() if name not in frozen}
        heads = {"a": lambda p, z, x: (z @ p).mean(), "b": lambda p, z, x: z.square().mean()}
        objective = jd.multitask(lambda w, x: apply(frozen | w, buffers, x)[0], heads)
        head_params = {"a": torch.ones(4, dtype=torch.float64), "b": ()}
        (grads, _), _ = jd.grad(objective, jd.sum())(None, (tuned, head_params), X1)
        z = model(X1)
        (z.sum(1).mean() + z.square().mean()).backward()
        assert_trees_close(grads, {name: model.get_parameter(name).grad for name in tuned})

    def test_compiles_with_scaled_heads(self):
        step = jd.grad_and_value(small_multitask(scale_heads=True), jd.upgrad())
        fast, counter = compiled(step)
        params = multitask_params()
        assert_trees_close(fast(None, params, X1), step(None, params, X1))
        assert counter.graphs == 1

    def test_overlap_is_found_by_identity_and_by_memory(self):
        tied = nn.Linear(3, 3)
        heads = {"a": lambda p, z, x: (z @ p).mean()}
        objective = jd.multitask(lambda w, x: x.float() @ w, heads)
        same = (tied.weight.detach(), tied.weight.detach())
        for shared, head in (same, (same[0], same[0])):
            with pytest.raises(ValueError, match=r"heads must not be shared .* at 'a'"):
                jd.jac(objective)((shared, {"a": head}), X1)
        fast, _ = compiled(jd.jac(objective))
        with pytest.raises(Exception, match="heads must not be shared"):
            fast((same[0], {"a": same[0]}), X1)


class TestAccumulate:
    @pytest.mark.parametrize("n", [1, 2, 3, 6])
    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_every_verb_equals_the_whole_batch(self, n, chunk_size):
        parts = jd.accumulate(losses_of, n, chunk_size=chunk_size)
        assert_trees_close(parts(PARAMS, X1), losses_of(PARAMS, X1))
        want = jd.jac_and_value(losses_of)(PARAMS, X1)
        assert_trees_close(jd.jac_and_value(parts)(PARAMS, X1), want)
        for route in ("auto", "jacobian", "product"):
            got = jd.gramian(parts, route=route)(PARAMS, X1)
            torch.testing.assert_close(got, jd.gramian(losses_of)(PARAMS, X1))
            for rule in (jd.upgrad(), jd.mean(), jd.trimmed_mean(0)):
                got = jd.grad_and_value(parts, rule, route=route)(None, PARAMS, X1)
                want = jd.grad_and_value(losses_of, rule)(None, PARAMS, X1)
                assert_trees_close(got, want)
        crossed = jd.cross_gramian(parts)(PARAMS, (X1,), (X2,))
        torch.testing.assert_close(crossed, jd.cross_gramian(losses_of)(PARAMS, (X1,), (X2,)))

    def test_scalarizers_see_the_mean_losses(self):
        rule = jd.scalarizers.geometric_mean()
        got = jd.grad(jd.accumulate(lambda p, x: losses_of(p, x)["b"], 2), rule)(None, PARAMS, X1)
        want = jd.grad(lambda p, x: losses_of(p, x)["b"], rule)(None, PARAMS, X1)
        assert_trees_close(got, want)

    def test_auxiliary_output_is_stacked_and_shared_arguments_are_kept(self):
        def fn(params, scale, x):
            losses = {name: scale * loss for name, loss in losses_of(params, x).items()}
            return losses, {"mean": x.mean(0)}

        parts = jd.accumulate(fn, 3, (None, None, 0), has_aux=True)
        two = torch.tensor(2.0, dtype=torch.float64)
        _, (losses, aux), _ = jd.grad_and_value(parts, jd.upgrad(), has_aux=True)(
            None, PARAMS, two, X1
        )
        assert_trees_close((losses, aux), parts(PARAMS, two, X1))
        assert_trees_close(aux["mean"], X1.reshape(3, 2, 3).mean(1))
        want = {name: 2 * loss for name, loss in losses_of(PARAMS, X1).items()}
        assert_trees_close(losses, want)

    def test_heads_accumulate_too(self):
        objective, params = small_multitask(), multitask_params()
        got = jd.grad_and_value(jd.accumulate(objective, 3), jd.upgrad())(None, params, X1)
        assert_trees_close(got, jd.grad_and_value(objective, jd.upgrad())(None, params, X1))

    def test_one_graph_at_a_time_and_dropout_drawn_once(self):
        alive, most = set(), []

        class Probe(torch.autograd.Function):
            """The identity, which knows when its graph is freed."""

            @staticmethod
            def forward(x):
                return x.clone()

            @staticmethod
            def setup_context(ctx, inputs, output):
                token = object.__new__(Token)
                alive.add(id(token))
                most.append(len(alive))
                ctx.token = token

            @staticmethod
            def backward(ctx, *grad_outputs):
                return grad_outputs[0]

        class Token:
            def __del__(self):
                alive.discard(id(self))

        def fn(params, x):
            return losses_of({**params, "first": Probe.apply(params["first"])}, x)

        jd.jac(jd.accumulate(fn, 6, chunk_size=1))(PARAMS, X1)
        assert set(most) == {1}

        def dropped(params, x):
            return losses_of(params, nn.functional.dropout(x, 0.5))

        for chunk_size in (None, 1):
            torch.manual_seed(0)
            jac, losses = jd.jac_and_value(jd.accumulate(dropped, 2, chunk_size=chunk_size))(
                PARAMS, X1
            )
            torch.manual_seed(0)
            masked = torch.cat([nn.functional.dropout(x, 0.5) for x in X1.chunk(2)])
            want = jd.jac_and_value(losses_of)(PARAMS, masked)
            assert_trees_close((jac, losses), want)

    def test_two_passes_for_methods_that_weigh_by_the_gramian(self):
        rule, batches = weighting(jd.upgrad()), X1.chunk(3)
        cross = jd.cross_gramian(vector_of_losses)
        blocks = [cross(PARAMS, (x,), (y,)) for x in batches for y in batches]
        weights, _ = rule(_tree.mean(blocks))
        total = jd.accumulate(lambda params, x: vector_of_losses(params, x) @ weights, 3)
        grads, _ = jd.grad(total, jd.sum())(None, PARAMS, X1)
        assert_trees_close(grads, jd.grad(losses_of, jd.upgrad())(None, PARAMS, X1)[0])
        naive = _tree.mean([jd.gramian(losses_of)(PARAMS, x) for x in batches])
        assert not torch.allclose(naive, _tree.mean(blocks), rtol=1e-2), "Gramians do not add up"

    def test_compiles_and_maps(self):
        step = jd.grad_and_value(jd.accumulate(losses_of, 3), jd.upgrad())
        fast, counter = compiled(step)
        assert_trees_close(fast(None, PARAMS, X1), step(None, PARAMS, X1))
        assert counter.graphs == 1
        mapped = vmap(lambda x: step(None, PARAMS, x)[0])(torch.stack([X1, X2]))
        assert_trees_close(mapped, _tree.stack([step(None, PARAMS, x)[0] for x in (X1, X2)]))
        assert jd.init_state(jd.upgrad(), jd.accumulate(losses_of, 3), PARAMS, X1) == ()

    def test_buffers_are_handed_from_one_part_to_the_next(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
        apply, params, buffers = jd.functionalize(model)

        def objective(params, buffers, x):
            outputs, buffers = apply(params, buffers, x)
            return outputs.square().mean(0), buffers

        parts = jd.accumulate(objective, 3, has_aux=True, carry_aux=1)
        want = buffers
        for x in X1.chunk(3):
            want = objective(params, want, x)[1]
        _, (losses, after), _ = jd.grad_and_value(parts, jd.upgrad(), has_aux=True)(
            None, params, buffers, X1
        )
        assert_trees_close(after, want)
        assert_trees_close(parts(params, buffers, X1), (losses, want))
        scalar = jd.grad_and_value(parts, jd.scalarizers.mean(), has_aux=True)
        assert_trees_close(scalar(None, params, buffers, X1)[1][1], want)
        model.load_state_dict({**params, **after})

    def test_keeps_the_route_of_what_it_wraps(self):
        parts = jd.accumulate(losses_of, 2)
        for route in ROUTES:
            got = jd.gramian(parts, route=route)(PARAMS, X1)
            torch.testing.assert_close(got, jd.gramian(losses_of)(PARAMS, X1))


OBJECTIVES = {"losses": losses_of, "instancewise": jd.instancewise(instance_losses)}


class TestPartial:
    @every_route
    @pytest.mark.parametrize("fn", OBJECTIVES.values(), ids=OBJECTIVES)
    @pytest.mark.parametrize("names", [("last",), ("first",), ("first", "last")])
    def test_weights_come_from_some_parameters_and_serve_all(self, route, fn, names):
        def flat(params, x):
            return _tree.ravel(fn(params, x))

        rows = oracles.jacobian_by_loops(flat, PARAMS, X1)
        some = {name: rows[name] for name in names}
        weights, _ = weighting(jd.upgrad())(_tree.gramian(some))
        step = jd.grad_and_value(fn, jd.upgrad(), route=route, where=lambda path: path in names)
        grads, losses, _ = step(None, PARAMS, X1)
        assert_trees_close(grads, weighted(rows, weights), rtol=1e-7)
        assert_trees_close(losses, fn(PARAMS, X1))
        short = jd.grad(fn, jd.upgrad(), route=route, where=lambda path: path in names)
        assert_trees_close(short(None, PARAMS, X1)[0], grads)

    def test_state_and_auxiliary_output_go_through(self):
        options = {"has_aux": True, "where": lambda path: path == "last"}
        rule = jd.smoothed(jd.upgrad())
        step = jd.grad_and_value(with_aux, rule, **options)
        state = jd.init_state(rule, with_aux, PARAMS, X1, has_aux=True)
        _, (losses, aux), after = step(state, PARAMS, X1)
        assert_trees_close((losses, aux), with_aux(PARAMS, X1))
        assert _tree.same_structure(state, after)

    def test_one_forward_pass_and_dropout_drawn_once(self):
        calls = []

        def fn(params, x):
            calls.append(x)
            return losses_of(params, nn.functional.dropout(x, 0.5))

        torch.manual_seed(0)
        grads, _ = jd.grad(fn, jd.mgda(), where=lambda path: path == "last")(None, PARAMS, X1)
        torch.manual_seed(0)
        x = nn.functional.dropout(X1, 0.5)
        step = jd.grad(losses_of, jd.mgda(), where=lambda path: path == "last")
        assert_trees_close(grads, step(None, PARAMS, x)[0])
        assert len(calls) == 1

    def test_compiles_maps_and_differentiates(self):
        step = jd.grad(losses_of, jd.upgrad(), where=lambda path: path.startswith("last"))
        fast, counter = compiled(step)
        assert_trees_close(fast(None, PARAMS, X1), step(None, PARAMS, X1))
        assert counter.graphs == 1
        mapped = vmap(lambda x: step(None, PARAMS, x)[0])(torch.stack([X1, X2]))
        assert_trees_close(mapped, _tree.stack([step(None, PARAMS, x)[0] for x in (X1, X2)]))

        def length(x):
            return _tree.ravel(step(None, PARAMS, x)[0]).square().sum()

        assert_differentiable(length, X1)


def test_objectives_are_sampled_with_a_key():
    """Sub-sampling: the losses of this step are a random part, drawn from the key in the loop."""

    def some(params, x, chosen):
        return vector_of_losses(params, x)[chosen]

    def many(params, x):
        return (x @ params["first"]).tanh().reshape(-1)

    @torch.compile(fullgraph=True, backend="eager")
    def step(params, state, key, x):
        key, draw = jd.random.split(key)
        chosen = jd.random.permutation(draw, 24)[:5]
        sampled = lambda params, x: many(params, x)[chosen]  # ruff: ignore[lambda-assignment]
        grads, losses, state = jd.grad_and_value(sampled, jd.upgrad())(state, params, x)
        return _tree.map(lambda p, g: p - 0.1 * g, params, grads), state, key, losses

    params = {"first": PARAMS["first"]}
    state, key = (), jd.random.key(0)
    rows = oracles.jacobian_by_loops(many, params, X1)
    _, draw = jd.random.split(key)
    chosen = jd.random.permutation(draw, 24)[:5]
    after, state, key, losses = step(params, state, key, X1)
    torch.testing.assert_close(losses, many(params, X1)[chosen])
    want, _ = jd.upgrad()(_tree.map(lambda leaf: leaf[chosen], rows))
    assert_trees_close(after, _tree.map(lambda p, g: p - 0.1 * g, params, want), rtol=1e-7)
    _, _, key, again = step(params, state, key, X1)
    assert not torch.equal(again, losses), "another draw"
