"""Entry points of `jd.distributed` on drawn arguments, in a group of one process.

python -m tests.distributed.fuzz --n 3000 --seed 0

A call has to return, or to raise an error that says what must hold, what came and what to do; in
both cases it leaves its arguments and the global generators alone, and does not wait for ever.
"""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import torchjd_func as jd
from tests import fuzz, registry, scalarizer_registry, wrong
from tests.fuzz import Call, Draw, main

PATIENCE = 300.0  # seconds, after which the tracebacks of a run that hangs are printed
WRAPPERS = ("data_parallel", "across_workers")


def _wrapped(draw: Draw) -> Call:
    """Draw a call of a rule over processes, on rows."""
    name, wrapper = draw.source.choice(list(registry.METHODS)), draw.source.choice(WRAPPERS)
    method = registry.METHODS[name]

    def call(jac: Any, losses: Any, present: Any, key: Any, group: Any, check: Any) -> Any:
        rule = getattr(jd.distributed, wrapper)(method.make(draw.m), group, check=check)
        state = rule.init(jac, key=key)
        out, state = rule(jac, state, losses=losses, present=present)
        return out, rule(jac, state, losses=losses, present=present)

    key = draw.key() if method.random == (draw.source.random() < 0.97) else None
    losses = draw.positive() if method.needs_losses or draw.source.random() < 0.3 else None
    check = draw.source.random() < 0.8
    return Call(f"{wrapper}({name})", call, (draw.jac(), losses, draw.present(), key, None, check))


def _scalarized(draw: Draw) -> Call:
    """Draw a call of a scalarizer over processes, and an observation."""
    name = draw.source.choice(list(scalarizer_registry.METHODS))
    method = scalarizer_registry.METHODS[name]

    def call(losses: Any, present: Any, key: Any, size: Any) -> Any:
        rule = jd.distributed.data_parallel(method.make(draw.m))
        state = rule.init(losses, key=key)
        _, state = rule(losses, state, present=present)
        if rule.observe is None:
            return state
        later = losses if method.observes == "losses" else None
        return rule.observe(later, state, present=present, size=size)

    key = draw.key() if method.random else None
    return Call(f"data_parallel({name})", call, (draw.losses(), draw.present(), key, _size(draw)))


def _size(draw: Draw) -> Any:
    """Return a number of examples."""
    return draw.source.choice([None, 0, 3, torch.tensor(2), draw.count()])


def _mean(draw: Draw) -> Call:
    """Draw a call of a mean."""
    tree = draw.source.choice([draw.jac, draw.losses, draw.vector])()

    def call(tree: Any, group: Any, size: Any, check: Any) -> Any:
        return jd.distributed.mean(tree, group, size=size, check=check)

    return Call("mean", call, (tree, None, _size(draw), draw.source.random() < 0.8))


def _same(draw: Draw) -> Call:
    """Draw a call of a comparison."""
    return Call("check_same", jd.distributed.check_same, (draw.jac(), None))


def _factory(draw: Draw) -> Call:
    """Draw a call of what makes rules and objectives."""
    name = draw.source.choice([*WRAPPERS, "sharded", "gathered"])
    good = jd.instancewise(_examples) if name in ("sharded", "gathered") else jd.upgrad()

    def call(value: Any, group: Any) -> Any:
        made = getattr(jd.distributed, name)
        return made(value) if name == "sharded" else made(value, group)

    return Call(name, call, (good, None))


def _examples(params: Any, x: Any) -> Any:
    """Return a loss for each example."""
    return (x @ params["w"] + params["b"]).square().sum(1)


def _means(params: Any, x: Any) -> Any:
    """Return three losses."""
    return (x @ params["w"] + params["b"]).square().mean(0)


def _step(draw: Draw) -> Call:
    """Draw a step, of an objective and a rule one of which is over processes."""
    kind = draw.source.choice(["data_parallel", "across_workers", "sharded", "each", "gathered"])
    x = torch.randn(draw.source.choice([0, 3, 5]), 2, generator=draw.generator)
    verb = draw.source.choice(["grad", "gramian", "jac", "row_norms", "init_state"])
    mask = draw.source.choice([None, None, torch.ones(3, dtype=torch.bool), draw.present()])
    step = _taken(kind, verb, _places(draw))
    return Call(f"{verb}[{kind}]", step, (_params(draw), x, mask, _size(draw)))


def _params(draw: Draw) -> Any:
    """Return parameters."""
    return {
        "w": torch.randn(2, 3, generator=draw.generator),
        "b": draw.tensor(*draw.source.choice([(3,), (3,), (1,), ()])),
    }


def _places(draw: Draw) -> list[Any] | None:
    """Return the placements of a parameter; `None` of one that is whole."""
    kind = draw.source.random()
    if kind < 0.1:
        return None
    choice = [Partial()] if kind < 0.15 else [Shard(0), Shard(1), Replicate()]
    return [draw.source.choice(choice) for _ in range(draw.source.choice([1, 2]))]


def _taken(kind: str, verb: str, places: list[Any] | None) -> Callable[..., Any]:
    """Return a function that takes a step."""

    def call(params: Any, x: Any, present: Any, size: Any) -> Any:
        if places and kind in ("sharded", "each") and isinstance(params, dict) and "w" in params:
            mesh = init_device_mesh("cpu", (1,) * len(places))
            w = DTensor.from_local(params["w"], mesh, places, run_check=False)
            params = params | {"w": w}
        spread = {
            "data_parallel": (_means, jd.distributed.data_parallel(jd.upgrad())),
            "across_workers": (_means, jd.distributed.across_workers(jd.mgda())),
            "sharded": (jd.distributed.sharded(_means), jd.upgrad()),
            "each": (jd.distributed.sharded(jd.instancewise(_examples)), jd.mgda()),
            "gathered": (jd.distributed.gathered(jd.instancewise(_examples)), jd.mgda()),
        }
        fn, rule = spread[kind]
        if verb == "init_state":
            return jd.init_state(rule, fn, params, x)
        if verb == "grad":
            return jd.grad(fn, rule)(None, params, x, present=present, size=size)
        return getattr(jd, verb)(fn)(params, x, present=present, size=size)

    return call


KINDS = (_wrapped, _wrapped, _scalarized, _mean, _same, _factory, _step, _step, _step)


def draw_call(seed: int) -> Call:
    """Draw a call; of one in four, an argument of another type."""
    source = random.Random(seed)
    draw = Draw(source, torch.Generator().manual_seed(seed))
    draw.m = draw.size()
    call = source.choice(KINDS)(draw)
    if source.random() < 0.25:
        place = source.randrange(len(call.args))
        value = wrong.VALUES[source.choice(list(wrong.VALUES))]
        step = call.name.endswith("]") and "[" in call.name.partition("(")[0]
        if step and (place == 1 or (place == 0 and isinstance(value, torch.Tensor))):
            return call  # what the objective raises is not ours
        call.args = (*call.args[:place], value, *call.args[place + 1 :])
    return call


def faults(n: int, seed: int) -> list[tuple[int, str, str]]:
    """Return seeds, calls and faults of `n` calls, in a group of one process."""
    store: Any = torch.distributed.HashStore()  # pyright: ignore
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        return fuzz.faults(n, seed, draw_call)
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(__doc__, faults)
