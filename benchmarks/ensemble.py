"""Time models trained together, in one vmapped program, against the same models one by one.

    OMP_NUM_THREADS=1 python -m benchmarks.ensemble [--members 8 32 128] [--quick]

The two tasks of `benchmarks.digits`, UPGrad, a preference for each model, one batch for all: a
step of all models is one call of `jd.ensemble.each(step)`, or a call of `step` for each model. Both
eager and compiled; what a first call takes is told apart. One thread; minima of interleaved
repeats in one process; bytes of the eager calls by `chunk_size`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import torchjd_func as jd
from benchmarks import _memory, digits
from benchmarks.gramian import machine, minima, seconds, table
from torchjd_func import _tree

RESULTS = pathlib.Path(__file__).parent / "results"
ROUTES = ("runs", "ensemble", "runs_compiled", "ensemble_compiled")
STEPS = 20  # after which both ways must have the same parameters
Step = Callable[..., Any]


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


def measure(problem: digits.Problem, k: int, names: Sequence[str]) -> dict[str, Any]:
    """Time a step of `k` models on each route, in ms, and first calls that compile, in s."""
    wanted, stacked = preferences(k), start(k)
    models, batch = jd.ensemble.unstack(stacked), digits.pick(problem.train, jd.random.key(0))
    step = make_step(problem)
    many = jd.ensemble.each(step, shared=2)
    torch.compiler.reset()  # otherwise the shapes of the second k become symbols
    fast, fast_many = (torch.compile(fn, fullgraph=True) for fn in (step, many))
    routes = {
        "runs": lambda: each_by_itself(step, wanted, models, batch),
        "ensemble": lambda: many(wanted, stacked, batch),
        "runs_compiled": lambda: each_by_itself(fast, wanted, models, batch),
        "ensemble_compiled": lambda: fast_many(wanted, stacked, batch),
    }
    routes = {name: routes[name] for name in names}
    compiling = {name: seconds(fn) for name, fn in routes.items() if "compiled" in name}
    row = {"members": k} | {f"{name}_ms": 1e3 * value for name, value in minima(routes).items()}
    return row | {f"{name}_first_s": value for name, value in compiling.items()}


def chunks(problem: digits.Problem, k: int) -> list[dict[str, Any]]:
    """Measure eager steps of `k` models, so many at a time: ms, and MB at the peak."""
    wanted, stacked = preferences(k), start(k)
    batch = digits.pick(problem.train, jd.random.key(0))
    sizes = [size for size in (1, 4, 8, 16) if size < k] + [k]
    step = make_step(problem)
    ways = {size: jd.ensemble.each(step, shared=2, chunk_size=size) for size in sizes}
    calls = {str(size): lambda fn=fn: fn(wanted, stacked, batch) for size, fn in ways.items()}
    times, known = minima(calls), [wanted, *_tree.leaves(stacked), *batch]
    return [
        {
            "members": k,
            "chunk_size": int(size),
            "ensemble_ms": 1e3 * times[size],
            "peak_mb": _memory.peak(lambda *_, call=call: call(), *known) / 1e6,
        }
        for size, call in calls.items()
    ]


def gap(problem: digits.Problem, k: int) -> float:
    """Return the largest difference of a parameter after training both ways, in float64."""
    images, labels = problem.train
    wanted, together = preferences(k).double(), _tree.map(torch.Tensor.double, start(k))
    apart, step = jd.ensemble.unstack(together), make_step(problem)
    many = jd.ensemble.each(step, shared=2)
    for key in jd.random.split(jd.random.key(1), STEPS):
        batch = digits.pick((images.double(), labels), key)
        together, _ = many(wanted, together, batch)
        apart = [params for params, _ in each_by_itself(step, wanted, apart, batch)]
    pairs = zip(_tree.leaves(together), _tree.leaves(jd.ensemble.stack(apart)), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def report(rows: list[dict[str, Any]], parts: list[dict[str, Any]]) -> str:
    """Return times, ratios and memory as Markdown."""
    cells = []
    for row in rows:
        times = {name: row.get(f"{name}_ms", math.nan) for name in ROUTES}
        faster = times["runs"] / times["ensemble"]
        compiled = times["runs_compiled"] / times["ensemble_compiled"]
        firsts = [row.get(f"{name}_first_s", math.nan) for name in ROUTES[2:]]
        both = dict(zip(("one", "all"), firsts, strict=True))
        cells.append({"k": row["members"]} | times | {"x": faster, "xc": compiled} | both)
    head = ["models", "one by one, ms", "together, ms", "one by one, compiled, ms"]
    head += ["together, compiled, ms", "times faster", "times faster, compiled"]
    head += ["first call of one, s", "first call of all, s"]
    by_chunk = table(parts, ["models", "at a time", "together, ms", "peak, MB"], 2)
    return f"{table(cells, head, 1)}\n\n{by_chunk}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, save all numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ensemble", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--members", nargs="+", type=int, default=[8, 32, 128], help="models")
    parser.add_argument("--quick", action="store_true", help="eager only, in some seconds")
    parser.add_argument("--out", type=pathlib.Path, help="default: results, or temporary if quick")
    options = parser.parse_args(arguments)
    if min(options.members) < 1:
        parser.error(f"argument --members: must be positive, got {min(options.members)}")
    folder = pathlib.Path(tempfile.gettempdir()) if options.quick else RESULTS
    out = options.out or folder / "ensemble.json"
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # first calls compile afresh
    problem, names = digits.two_digits(0), ROUTES[:2] if options.quick else ROUTES
    rows = [measure(problem, k, names) for k in tqdm(options.members, unit="size")]
    middle = sorted(options.members)[len(options.members) // 2]
    parts, apart = chunks(problem, middle), gap(problem, middle)
    where = machine()
    print(f"torch {where['torch']}, {where['machine']}, {where['date']}:\n\n{report(rows, parts)}")
    print(f"\nLargest difference of a parameter after {STEPS} steps, in float64: {apart:.1e}")
    found = {"machine": where, "rows": rows, "chunks": parts, "difference": apart}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
