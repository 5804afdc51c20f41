"""Time the compilation of training steps, and what the compiled steps are worth.

    OMP_NUM_THREADS=1 python -m benchmarks.compiling [--methods upgrad ...] [--objectives 4]

One step of gradient descent with four losses, on a network 64-128-128-4, as one graph
(`fullgraph=True`): the first call with none of its kernels cached, the same again after
`torch.compiler.reset()`, when they are, and steps eager and compiled. One thread; minima of
interleaved repeats.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import torchjd_func as jd
from benchmarks._form import DEVICES, Benchmark, Cell, Row, clock, compiled, main, minima, table

METHODS: dict[str, Callable[[], jd.Aggregator]] = {
    "mean": jd.mean,
    "upgrad": jd.upgrad,
    "mgda": jd.mgda,
    "cagrad": jd.cagrad,
    "gradvac": jd.gradvac,
    "nash_mtl": jd.nash_mtl,
    "upgrad, by layer": lambda: jd.grouped(jd.upgrad(), jd.by_layer),
}
BATCH = 64


def training_step(
    rule: jd.Aggregator, m: int, device: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a step, and its arguments: state, parameters, a batch."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, m)]
        apply, params, _ = jd.functionalize(nn.Sequential(*layers).to(device))
    x = torch.randn(BATCH, 64, generator=generator).to(device)
    y = torch.randn(BATCH, m, generator=generator).to(device)

    def objective(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the squared errors of the outputs."""
        return (apply(params, {}, x)[0] - y).square().mean(0)

    def step(state: Any, params: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Any, Any]:
        """Descend once."""
        grads, state = jd.grad(objective, rule)(state, params, x, y)
        return state, {name: params[name] - 0.1 * grads[name] for name in params}

    state = jd.init_state(rule, objective, params, x, y, key=jd.random.key(0))
    return step, (state, params, x, y)


def measure(name: str, m: int, seconds: float, device: str) -> Iterator[Row]:
    """Compile twice, and time the steps."""
    step, args = training_step(METHODS[name](), m, device)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        first_call(torch.sin, args[-1:], device)  # headers and imports
        first, again = (first_call(step, args, device) for _ in range(2))
        fast = compiled(step, device)
        times = minima({"eager": partial(step, *args), "compiled": partial(fast, *args)}, seconds)
    row = {"method": name, "first_s": first, "again_s": again}
    yield row | {f"{key}_ms": 1e3 * value for key, value in times.items()}


def first_call(step: Callable[..., Any], args: tuple[Any, ...], device: str) -> float:
    """Return how many seconds the first call of a compiled step takes."""
    torch.compiler.reset()
    return clock(partial(compiled(step, device), *args))


def report(rows: list[Row]) -> str:
    """Return seconds to compile, and milliseconds of steps, as Markdown."""
    keys = ("first_s", "again_s", "eager_ms", "compiled_ms")
    lines = [
        [f"`{row['method']}`", *(row[key] for key in keys), row["eager_ms"] / row["compiled_ms"]]
        for row in rows
    ]
    head = ["first call, s", "again, cached, s", "eager, ms", "compiled, ms", "times faster"]
    return table(["method", *head], lines, digits=2)


def cells(methods: Sequence[str], objectives: int, seconds: float, device: str) -> list[Cell]:
    """Return the methods."""
    return [(name, partial(measure, name, objectives, seconds, device)) for name in methods]


BENCHMARK = Benchmark(
    name="compiling",
    about=__doc__,
    cells=cells,
    report=report,
    full={"methods": tuple(METHODS), "objectives": 4, "seconds": 1.0, "device": "cpu"},
    quick={"methods": ("mean", "upgrad"), "seconds": 0.2},
    choices={"methods": METHODS, "device": DEVICES},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
