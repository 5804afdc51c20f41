"""One form for all benchmarks: settings, progress, tables, results with date and machine.

A module describes itself in one `Benchmark` and ends in `raise SystemExit(main(BENCHMARK))`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

RESULTS = pathlib.Path(__file__).parent / "results"  # of full runs, committed
QUICK = pathlib.Path(__file__).parent / "quick"  # of all others, ignored by git
DEVICES = ("cpu", "cuda")
ROUNDS, SHORT = 5, 0.2  # fewest repeats, and seconds up to which calls are repeated at once
Row = dict[str, Any]
Cell = tuple[str, Callable[[], Iterable[Row]]]
Routes = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What is measured, at which size, and how it is shown.

    Attributes:
        name: The module, and the stem of its files.
        about: What the help of the command says.
        cells: `(**settings) -> [(label, measure)]`, where `measure()` gives rows of the result.
        report: `rows -> text`, with tables in Markdown.
        full: The settings of the tables in the manual; each is an option of the command.
        quick: What differs in a quick run.
        choices: What may be chosen for a setting.
        draw: `(rows, path)`; saves a picture.
    """

    name: str
    about: str | None
    cells: Callable[..., list[Cell]]
    report: Callable[[list[Row]], str]
    full: dict[str, Any]
    quick: dict[str, Any]
    choices: Mapping[str, Iterable[str]] = field(default_factory=dict)
    draw: Callable[[list[Row], pathlib.Path], None] | None = None


def main(
    *benchmarks: Benchmark, arguments: Sequence[str] | None = None, quick: bool = False
) -> int:
    """Measure, print the tables, save all numbers and the pictures.

    Args:
        *benchmarks: What to run; one alone has its settings as options.
        arguments: The command line.
        quick: Whether quick runs are the default.

    Returns:
        The exit status.
    """
    parser = _parser(benchmarks, quick)
    options = vars(parser.parse_args(arguments))
    quick, out, only = (options.pop(key) for key in ("quick", "out", "only"))
    for key, value in options.items():
        _check(parser, key, value, benchmarks[0].full[key])
    if options.get("device") == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device")
    complete = not (quick or set(options) - {"device"})
    plan = {
        benchmark: benchmark.full | (benchmark.quick if quick else {}) | options
        for benchmark in benchmarks
        if benchmark.name in only and options.keys() <= benchmark.full.keys()
    }
    torch.set_num_threads(1)
    run(plan, out or (RESULTS if complete else QUICK))
    return 0


def run(plan: Mapping[Benchmark, dict[str, Any]], folder: pathlib.Path) -> None:
    """Measure all cells of benchmarks at their settings; show and save each benchmark."""
    cells = {benchmark: benchmark.cells(**settings) for benchmark, settings in plan.items()}
    with tqdm(total=sum(map(len, cells.values())), unit="cell", dynamic_ncols=True) as bar:
        for benchmark, settings in plan.items():
            rows: list[Row] = []
            for label, measure in cells[benchmark]:
                bar.set_description(f"{benchmark.name}, {label}")
                torch.compiler.reset()  # which compiles what has one code only so often
                rows += measure()
                bar.update()
            tqdm.write(f"\n{benchmark.report(rows)}\n\n{save(benchmark, settings, rows, folder)}\n")


def save(
    benchmark: Benchmark, settings: dict[str, Any], rows: list[Row], folder: pathlib.Path
) -> str:
    """Write numbers and picture to a folder, and say where and when they are from."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine(settings.get("device", "cpu"))
    path = folder / f"{'-'.join([benchmark.name, *where.get('card', '').split()])}.json"
    path.write_text(json.dumps(where | {"settings": settings, "rows": rows}, indent=1) + "\n")
    paths = [path]
    if benchmark.draw:
        paths.append(path.with_suffix(".png"))
        benchmark.draw(rows, paths[-1])
    return f"{', '.join(map(str, where.values()))}: {' '.join(map(str, paths))}"


def load(name: str) -> list[Row]:
    """Return the committed rows of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def machine(device: str = "cpu") -> dict[str, str]:
    """Return when and where this is measured."""
    card = {} if device == "cpu" else {"card": torch.cuda.get_device_name(device)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchjd")}
    return (
        {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "python": f"Python {platform.python_version()}",
        }
        | card
        | {name: f"{name} {version}" for name, version in versions.items()}
    )


def minima(routes: Routes, seconds: float, slow: float = math.inf) -> dict[str, float]:
    """Return the shortest time of each route, interleaved, after a first call, which may compile.

    Args:
        routes: What to time, by name.
        seconds: How long to repeat; at least `ROUNDS` times.
        slow: The seconds of a call, also of a second one, from which a route is left out.

    Returns:
        Seconds, by name.
    """
    kept = [name for name, fn in routes.items() if clock(fn) < slow or clock(fn) < slow]
    best, spent, rounds = dict.fromkeys(kept, math.inf), 0.0, 0
    while kept and (rounds < ROUNDS or spent < seconds):
        for name in kept if rounds % 2 else reversed(kept):  # not always after the same one
            taken = [clock(routes[name]) for _ in range(3 if best[name] < SHORT else 1)]
            best[name], spent = min(best[name], *taken), spent + sum(taken)
        rounds += 1
    return best


def clock(route: Callable[[], Any]) -> float:
    """Return how many seconds one call takes, with all that it starts on a device."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else bool
    wait()
    start = time.perf_counter()
    route()
    wait()
    return time.perf_counter() - start


def graphed(route: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a route that a CUDA graph has captured."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        route()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        route()
    return graph.replay


def compiled(fn: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """Return the function as one graph, on a device one that CUDA captures."""
    mode = "default" if device == "cpu" else "reduce-overhead"
    return torch.compile(lambda *args: fn(*args), fullgraph=True, mode=mode)


def table(head: Sequence[str], rows: Iterable[Sequence[str | float]], digits: int = 3) -> str:
    """Return a table in Markdown, its numbers with that many digits."""
    cells = [[x if isinstance(x, str) else number(x, digits) for x in row] for row in rows]
    first, *rest = (f"| {' | '.join(line)} |" for line in [head, *cells])
    return "\n".join([first, "|---" * len(head) + "|", *rest])


def number(value: float, digits: int) -> str:
    """Return the first digits of a number; a dash for none."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def exponent(rows: Iterable[Row], x: str, y: str) -> float:
    """Fit `a` in `y ~ x^a`, of two columns; not-a-number without two different `x`."""
    logs = np.log([(row[x], row[y]) for row in rows if y in row])
    if len(logs) < 2 or np.ptp(logs[:, 0]) == 0:
        return math.nan
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def _parser(benchmarks: Sequence[Benchmark], quick: bool) -> argparse.ArgumentParser:
    """Return the options: of all, or with the settings of the only one."""
    alone = benchmarks[0] if len(benchmarks) == 1 else None
    names = [benchmark.name for benchmark in benchmarks]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks{f'.{alone.name}' if alone else ''}",
        description=alone.about if alone else "Run the benchmarks, at a quick size.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", dest="quick", action="store_false", help="as in the manual")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results")
    parser.set_defaults(quick=quick, only=names)
    if alone is None:
        parser.add_argument("--only", nargs="+", choices=names)
        about = "where; only what can be measured there"
        parser.add_argument("--device", choices=DEVICES, default=argparse.SUPPRESS, help=about)
        return parser
    for key, value in alone.full.items():
        option, missing = f"--{key}", argparse.SUPPRESS
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true", default=missing)
            continue
        kind, nargs = (type(value[0]), "+") if isinstance(value, tuple) else (type(value), None)
        choices = alone.choices.get(key)
        parser.add_argument(option, type=kind, nargs=nargs, choices=choices, default=missing)
    return parser


def _check(parser: argparse.ArgumentParser, key: str, value: Any, default: Any) -> None:
    """Refuse numbers that are too small: negative, or 0 for counts."""
    numbers = [x for x in np.atleast_1d(value).tolist() if isinstance(x, int | float)]
    first = default[0] if isinstance(default, tuple) else default
    least = 1 if isinstance(first, int) and first > 0 else 0
    if any(x < least for x in numbers):
        parser.error(f"argument --{key}: must be at least {least}, got {min(numbers)}")
