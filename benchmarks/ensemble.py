"""Time models trained together, in one vmapped program, against the same models one by one.

    OMP_NUM_THREADS=1 python -m benchmarks.ensemble [--members 8 32 128]

The two tasks of `benchmarks.digits`, UPGrad, a preference for each model, one batch for all: a
step of all models is one call of `jd.ensemble.each(step)`, or a call of `step` for each model. Both
eager and compiled; what a first call takes is told apart. One thread; minima of interleaved
repeats in one process. On a device (`--device cuda`) what is compiled is a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

import torchjd_func as jd
from benchmarks import digits
from benchmarks._form import DEVICES, Benchmark, Cell, Row, clock, compiled, main, minima, table

Step = Callable[..., Any]
ROUTES = ("runs", "together", "runs_compiled", "together_compiled")


def cells(members: Sequence[int], eager: bool, seconds: float, device: str) -> list[Cell]:
    """Return the numbers of models."""
    return [(f"{k} models", partial(measure, k, eager, seconds, device)) for k in members]


def make_step(problem: digits.Problem) -> Step:
    """Return the training step of one model, `(preference, params, batch) -> (params, losses)`."""

    def step(preference: Tensor, params: Any, batch: digits.Batch) -> tuple[Any, Any]:
        """Descend along the direction that the preference asks for."""
        gradient = jd.grad_and_value(problem.objective, jd.upgrad(preference))
        grads, losses, _ = gradient(None, params, batch)
        return digits.descend(params, grads, digits.LEARNING_RATE), losses

    return step


def preferences(k: int) -> Tensor:
    """Return evenly spread preferences `(k, 2)`, inside the simplex."""
    first = (torch.arange(k) + 0.5) / k
    return torch.stack([first, 1 - first], dim=1)


def start(k: int) -> Any:
    """Return the parameters of `k` models, stacked, each of a seed of its own."""
    return jd.ensemble.stack([digits.two_digits(seed).params for seed in range(k)])


def each_by_itself(step: Step, wanted: Tensor, params: list[Any], batch: digits.Batch) -> list[Any]:
    """Call the step of one model for all models."""
    return [step(own, model, batch) for own, model in zip(wanted, params, strict=True)]


def measure(k: int, eager: bool, seconds: float, device: str) -> Iterator[Row]:
    """Time a step of `k` models on each route, in ms, and first calls that compile, in s."""
    problem = digits.two_digits(0)
    images, labels = digits.pick(problem.train, jd.random.key(0))
    wanted, batch = preferences(k).to(device), (images.to(device), labels.to(device))
    stacked: Any = optree.tree_map(lambda x: x.to(device), start(k))
    models = jd.ensemble.unstack(stacked)
    step = make_step(problem)
    many = jd.ensemble.each(step, shared=2)
    torch.compiler.reset()  # otherwise the shapes of the second k become symbols
    fast, fast_many = compiled(step, device), compiled(many, device)
    routes = {
        "runs": lambda: each_by_itself(step, wanted, models, batch),
        "together": lambda: many(wanted, stacked, batch),
        "runs_compiled": lambda: each_by_itself(fast, wanted, models, batch),
        "together_compiled": lambda: fast_many(wanted, stacked, batch),
    }
    routes = {name: routes[name] for name in (ROUTES[:2] if eager else ROUTES)}
    first = {f"{name}_first_s": clock(fn) for name, fn in routes.items() if "compiled" in name}
    times = {f"{name}_ms": 1e3 * value for name, value in minima(routes, seconds).items()}
    yield {"members": k} | times | first


def report(rows: list[Row]) -> str:
    """Return times and ratios as Markdown."""
    head = ["models", "how", "one by one, ms", "together, ms", "times faster"]
    head += ["first call of one, s", "first call of all, s"]
    lines = []
    for row in rows:
        for how in ("", "_compiled"):
            if (apart := row.get(f"runs{how}_ms")) is None:
                continue
            both = row[f"together{how}_ms"]
            firsts = [row.get(f"{name}{how}_first_s", math.nan) for name in ROUTES[:2]]
            name = "compiled" if how else "eager"
            lines.append([str(row["members"]), name, apart, both, apart / both, *firsts])
    return table(head, lines)


BENCHMARK = Benchmark(
    name="ensemble",
    about=__doc__,
    cells=cells,
    report=report,
    full={"members": (8, 32, 128), "eager": False, "seconds": 3.0, "device": "cpu"},
    quick={"members": (8,), "eager": True, "seconds": 0.5},
    choices={"device": DEVICES},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
