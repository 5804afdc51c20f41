"""One loss per example of all ranks equals one process with the whole batch."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchjd_func as jd
from tests import workers
from tests.differentiate.test_layerwise import build, explicit_rows, inputs
from tests.helpers import assert_trees_close, compiled
from tests.zoo import ZOO
from torchjd_func import _tree

SOME = ("mlp", "conv2d", "transformer", "no rule", "unused parameter")


def parts(name, world):
    """Return the losses, the parameters and the batch of each rank."""
    specimen, losses, params, first = build(name)
    return losses, params, [first, *(inputs(specimen) for _ in range(world - 1))]


def weights(m):
    """Return a number for each loss."""
    return torch.linspace(-1, 2, m, dtype=torch.float64)


def all_of(objective):
    """Return a function of parameters and a batch: losses, Gramian and a pullback."""

    def run(params, x):
        losses, gramian, vjp_fn = jd.gramian_vjp(objective, params, x)
        return losses, gramian, vjp_fn(weights(len(losses)))

    return run


def spread(names, kind, compile_it):
    """Return what this rank finds for some networks."""
    found = {}
    for name in names:
        losses, params, batches = parts(name, dist.get_world_size())
        objective = jd.instancewise(losses) if kind == "instancewise" else per_example(losses)
        run = all_of(jd.distributed.gathered(objective))
        run = compiled(run)[0] if compile_it else run
        found[name] = run(params, batches[dist.get_rank()])
    return found


def per_example(losses):
    """Return the objective of one example, mapped."""
    return jd.per_example(lambda params, x: losses(params, x.unsqueeze(0)).squeeze(0))


@functools.cache
def expected(name, world):
    """Return losses, Gramian and pullback by plain backward passes."""
    losses, params, batches = parts(name, world)
    rows = [explicit_rows(losses, params, x) for x in batches]
    jac = {key: torch.cat([part[key] for part in rows]) for key in params}
    values = torch.cat([losses(params, x) for x in batches]).detach()
    pulled = {key: torch.tensordot(weights(len(values)), leaf, 1) for key, leaf in jac.items()}
    return values, _tree.gramian(jac), pulled


@pytest.mark.parametrize(
    ("world", "kind", "compile_it", "names"),
    [
        (2, "instancewise", False, tuple(ZOO)),
        (2, "per_example", False, tuple(name for name in ZOO if ZOO[name].vmaps)),
        (4, "instancewise", False, SOME),
        (2, "instancewise", True, ("mlp", "no rule")),
    ],
)
def test_ranks_equal_plain_backward_passes(world, kind, compile_it, names):
    first, *others = workers.run(world, spread, names, kind, compile_it)
    for name in names:
        try:
            assert_trees_close(first[name], expected(name, world), rtol=1e-10, atol=1e-10)
            for other in others:
                assert_trees_close(other[name], first[name], rtol=0, atol=0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def squares(params, x, y):
    """Return a loss for each example."""
    return (torch.tanh(x @ params["w"]) @ params["v"] + params["b"] - y).square()


def setting(world):
    """Return parameters and a whole batch."""
    draws = jd.random.normal(jd.random.key(0), (200,), dtype=torch.float64)
    params = {"w": draws[:12].reshape(4, 3), "v": draws[12:15], "b": draws[15]}
    x = draws[20 : 20 + 16 * world].reshape(4 * world, 4)
    return params, (x, draws[-4 * world :])


def pipeline(wrap, part, world):
    """Return what transforms make of an objective."""
    objective = wrap(jd.instancewise(squares))
    params, (x, y) = setting(world)
    first, second = (part(x), part(y)), (part(x.flip(1)), part(y))
    keyed = jd.init_state(jd.rlw(), objective, params, *first, key=jd.random.key(3))
    batches = (first, second, first)
    rules = {
        "upgrad": jd.upgrad(),
        "mean": jd.mean(),
        "grouped": jd.grouped(jd.mgda(), jd.by_tensor),
    }
    found = {
        name: jd.grad_and_value(objective, r)(None, params, *first) for name, r in rules.items()
    }
    return {
        **found,
        "rlw": jd.grad(objective, jd.rlw())(keyed, params, *first),
        "where": jd.grad(objective, jd.upgrad(), where=lambda path: path == "w")(
            None, params, *first
        ),
        "cross": jd.cross_gramian(objective)(params, first, second),
        "two": jd.double_sampling(objective, jd.modo())(None, params, *batches[:2]),
        "three": jd.double_sampling(objective, jd.modo())(None, params, *batches),
        "bfloat16": jd.gramian(jd.cast_floating(objective, torch.bfloat16))(params, *first),
    }


def own(batch):
    """Return the part of a batch that this rank has."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def pipeline_here():
    """Run on this rank."""
    return pipeline(jd.distributed.gathered, own, dist.get_world_size())


@pytest.mark.parametrize("world", [2, 4])
def test_every_transform_equals_one_process(world):
    want = pipeline(lambda objective: objective, lambda batch: batch, world)
    for found in workers.run(world, pipeline_here):
        rounded = found.pop("bfloat16")
        assert_trees_close(found, {k: v for k, v in want.items() if k != "bfloat16"}, rtol=1e-9)
        torch.testing.assert_close(rounded, want["bfloat16"], rtol=1e-2, atol=1e-2)


def options(wrap, cut):
    """Return what scales, scalarizers and norms make of an objective of examples."""
    objective = wrap(jd.instancewise(squares))
    params, batch = setting(2)
    x, y = (cut(leaf) for leaf in batch)
    scaled = jd.loss_scale.scaled(objective, jd.loss_scale.init(2.0**10))
    present = cut(torch.arange(len(batch[0])) % 3 > 0)
    return {
        "scaled": jd.gramian(scaled)(params, x, y),
        "scalarizer": jd.grad(objective, jd.scalarizers.mean())(None, params, x, y),
        "norms": jd.row_norms(objective)(params, x, y),
        "clipped": jd.grad(objective, jd.clipped_mean(1.0))(None, params, x, y),
        "present": jd.grad(objective, jd.mgda())(None, params, x, y, present=present),
    }


def options_here():
    """Run on this rank."""
    return options(
        jd.distributed.gathered, lambda leaf: leaf.chunk(dist.get_world_size())[dist.get_rank()]
    )


def test_options_equal_one_process():
    want = options(lambda objective: objective, lambda leaf: leaf)
    for found in workers.run(2, options_here):
        assert_trees_close(found, want, rtol=1e-9, atol=1e-10)


def attempts():
    """Return what is said of mistakes."""
    objective = jd.distributed.gathered(jd.instancewise(squares))
    params, (x, y) = setting(2)
    tries = {
        "sizes": lambda: jd.gramian(objective)(params, x[dist.get_rank() :], y[dist.get_rank() :]),
        "size": lambda: jd.gramian(objective)(params, x, y, size=8 + dist.get_rank()),
        "jac": lambda: jd.jac(objective)(params, x, y),
        "jacobian": lambda: jd.gramian(objective, route="jacobian")(params, x, y),
        "product": lambda: jd.gramian(objective, route="product")(params, x, y),
        "rows": lambda: jd.grad(objective, jd.trimmed_mean(1))(None, params, x, y),
    }
    over = jd.distributed.data_parallel(jd.upgrad())
    for name, plain in {
        "plain": jd.instancewise(squares),
        "half": jd.cast_floating(jd.instancewise(squares), torch.float32),
        "one": per_example(squares),
    }.items():
        for route in ("auto", "jacobian"):
            step = jd.grad(plain, over, route=route)
            tries[f"{name} {route}"] = functools.partial(step, None, params, x, y)
    return {name: said(fn) for name, fn in tries.items()}


def said(fn):
    """Return the error of a call."""
    try:
        fn()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_mistakes_are_named_on_every_rank():
    for found in workers.run(2, attempts):
        assert found["sizes"].startswith("ValueError: `batch.1` must be the same on all processes")
        assert "got 8 rows on process 0 and 7 rows on process 1" in found["sizes"]
        assert "`size` must be at most 8" in found["size"]
        assert "got 9 on process 1" in found["size"]
        for name in ("jac", "jacobian", "product", "rows"):
            assert found[name].startswith("ValueError: the Jacobian of a gathered objective must")
        for name in ("plain", "half", "one"):
            for route in ("auto", "jacobian"):
                text = found[f"{name} {route}"]
                assert text.startswith("ValueError: the rule for InstanceWise(")
                assert "jd.distributed.gathered(objective)" in text


def test_only_instancewise_objectives_are_gathered():
    anything: Any = squares
    with pytest.raises(TypeError, match="must be instance-wise, got"):
        jd.distributed.gathered(anything)


def numbers_sent():
    """Return how many numbers this rank hands to gathers for the Gramian of wide layers."""
    objective, sent = jd.distributed.gathered(jd.instancewise(wide)), []
    assert objective.ranks is not None
    gather = objective.ranks.gather

    def counting(x):
        sent.append(x.numel())
        return gather(x)

    counted = replace(objective, ranks=objective.ranks._replace(gather=counting))
    jd.gramian(counted)([torch.ones(50, 70), torch.ones(70, 60)], torch.ones(3, 50))
    return sum(sent)


def wide(params, x):
    """Return a loss for each example of two layers."""
    return (torch.tanh(x @ params[0]) @ params[1]).square().sum(1)


def test_no_jacobian_travels():
    layers, rest = 3 * (50 + 70) + 3 * (70 + 60), 3 * 6 + 3  # factors; (b, m) and (b,)
    assert workers.run(2, numbers_sent) == [layers + rest] * 2
