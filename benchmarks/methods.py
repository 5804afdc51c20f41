"""Time each method against the object-oriented peer, over the number of objectives m.

    OMP_NUM_THREADS=1 python -m benchmarks.methods [--sizes 2 4 8 ...] [--methods upgrad ...]

Weights from the Gramian of Gaussian gradients in 4 m dimensions, and, for methods that need the
rows, the direction from an m x 10,000 matrix, with the memory it takes. Eager, one thread; minima
of interleaved repeats in one process. Methods that need cvxpy in the peer are timed alone. On a
device (`--device cuda`) also replayed as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torchjd.aggregation as peer

import torchjd_func as jd
from benchmarks import _memory, _picture
from benchmarks._form import (
    DEVICES,
    Benchmark,
    Cell,
    Routes,
    Row,
    exponent,
    graphed,
    main,
    minima,
    number,
    table,
)

Pair = tuple[Callable[[int], jd.Aggregator], Callable[[int], Any] | None]
WEIGHTS: dict[str, Pair] = {
    "mean": (lambda m: jd.mean(), lambda m: peer.MeanWeighting()),
    "sum": (lambda m: jd.sum(), lambda m: peer.SumWeighting()),
    "constant": (
        lambda m: jd.constant(torch.ones(m)),
        lambda m: peer.ConstantWeighting(torch.ones(m)),
    ),
    "rlw": (lambda m: jd.rlw(), lambda m: peer.RandomWeighting()),
    "upgrad": (lambda m: jd.upgrad(), lambda m: peer.UPGradWeighting()),
    "dualproj": (lambda m: jd.dualproj(), lambda m: peer.DualProjWeighting()),
    "mgda": (lambda m: jd.mgda(), lambda m: peer.MGDAWeighting()),
    "pcgrad": (lambda m: jd.pcgrad(), lambda m: peer.PCGradWeighting()),
    "gradvac": (lambda m: jd.gradvac(), lambda m: peer.GradVacWeighting()),
    "imtl_g": (lambda m: jd.imtl_g(), lambda m: peer.IMTLGWeighting()),
    "aligned_mtl": (lambda m: jd.aligned_mtl(), lambda m: peer.AlignedMTLWeighting()),
    "krum": (lambda m: jd.krum(1), lambda m: peer.KrumWeighting(1)),
    "fairgrad": (lambda m: jd.fairgrad(), lambda m: peer.FairGradWeighting(1.0)),
    "pcd": (lambda m: jd.pcd(), lambda m: peer.PCDWeighting()),
    "modo": (lambda m: jd.weighted(jd.modo()), lambda m: peer.MoDoWeighting()),
    "sdmgrad": (lambda m: jd.weighted(jd.sdmgrad()), lambda m: peer.SDMGradWeighting()),
    "nash_mtl": (lambda m: jd.nash_mtl(), None),
    "cagrad": (lambda m: jd.cagrad(), None),
}
ROWS: dict[str, Pair] = {
    "trimmed_mean": (lambda m: jd.trimmed_mean(1), lambda m: peer.TrimmedMean(1)),
    "graddrop": (lambda m: jd.graddrop(), lambda m: peer.GradDrop()),
    "config": (lambda m: jd.config(), lambda m: peer.ConFIG()),
    "excess_mtl": (lambda m: jd.excess_mtl(), lambda m: peer.ExcessMTL()),
}
PAIRS = WEIGHTS | ROWS
LEAST = {"krum": 4, "trimmed_mean": 4}  # smallest m that is measured
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
SUMMARY = (4, 16, 64)  # sizes of the geometric mean
N_PARAMS, N_INPUTS = 10_000, 3


def cells(methods: Sequence[str], sizes: Sequence[int], seconds: float, device: str) -> list[Cell]:
    """Return the methods, at all sizes that they take."""
    work = [(name, m) for name in methods for m in sizes if m >= LEAST.get(name, 2)]
    return [(f"{name}, m = {m}", partial(measure, name, m, seconds, device)) for name, m in work]


def measure(name: str, m: int, seconds: float, device: str) -> Iterator[Row]:
    """Time one method at one size; with the memory if it needs the rows."""
    make, make_peer = PAIRS[name]
    with torch.device(device):
        aggregator, other = make(m), make_peer(m) if make_peer else None
    generator = torch.Generator().manual_seed(m)
    n = N_PARAMS if name in ROWS else 4 * m
    jacobians = [torch.randn(m, n, generator=generator).to(device) for _ in range(N_INPUTS)]
    state = aggregator.init(jacobians[0], key=jd.random.key(0))
    rule: Any = aggregator if name in ROWS else aggregator.weighting
    inputs = jacobians if name in ROWS else [jac @ jac.mT for jac in jacobians]
    routes = {"ours": lambda x: rule(x, state)} | ({"torchjd": other} if other else {})
    calls: Routes = {key: partial(each, fn, inputs) for key, fn in routes.items()}
    if device != "cpu":
        calls = {**calls, **captured(calls["ours"])}
    times = minima(calls, seconds)
    row = {"method": name, "m": m}
    row |= {f"{key}_ms": 1e3 * value / N_INPUTS for key, value in times.items()}
    if name in ROWS and device == "cpu":
        peaks = {key: _memory.peak(fn, inputs[0]) for key, fn in routes.items()}
        row |= {f"{key}_memory": peak / inputs[0].nbytes for key, peak in peaks.items()}
    yield row


def captured(call: Callable[[], Any]) -> Routes:
    """Return the replay of a call, if a CUDA graph captures it."""
    try:
        return {"graph": graphed(call)}
    except RuntimeError:  # it waits for the host
        torch.cuda.synchronize()
        return {}


def each(fn: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
    """Call a function with all inputs."""
    for value in inputs:
        fn(value)


def ratio(row: Row, key: str = "ours_ms") -> float:
    """Return the peer's time over ours; not-a-number where there is no peer."""
    return row.get("torchjd_ms", math.nan) / row.get(key, math.nan)


def ratios(rows: list[Row], key: str = "ours_ms") -> str:
    """Return the ratios at all sizes as Markdown, without the methods that are timed alone."""
    sizes, lines = sorted({row["m"] for row in rows}), []
    for name, own in by_method(rows).items():
        found = {row["m"]: ratio(row, key) for row in own if "torchjd_ms" in row}
        if found:
            lines.append([f"`{name}`", *(found.get(m, math.nan) for m in sizes)])
    return table(["method", *(f"m = {m}" for m in sizes)], lines, digits=2)


def growth(rows: list[Row]) -> str:
    """Return the exponents of m from 16 on, and the memory at the largest m, as Markdown."""
    lines = []
    for name, own in by_method(rows).items():
        large = [row for row in own if row["m"] >= 16]
        fitted = [exponent(large, "m", key) for key in ("ours_ms", "torchjd_ms")]
        peaks = [own[-1].get(key, math.nan) for key in ("ours_memory", "torchjd_memory")]
        lines.append([f"`{name}`", *fitted, *peaks])
    head = ["method", "growth", "TorchJD's", "peak / matrix", "TorchJD's"]
    return table(head, lines, digits=2)


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each method."""
    names = dict.fromkeys(row["method"] for row in rows)
    return {name: [row for row in rows if row["method"] == name] for name in names}


def report(rows: list[Row]) -> str:
    """Return ratios, growth and memory as Markdown."""
    title = "TorchJD's time divided by ours:"
    parts = [title, ratios(rows), growth(rows), summary(rows)]
    if any("graph_ms" in row for row in rows):
        parts += ["In a CUDA graph:", ratios(rows, "graph_ms")]
    return "\n\n".join(parts)


def summary(rows: list[Row]) -> str:
    """Return the geometric mean of the ratios, and where we are slower."""
    compared = [row for row in rows if "torchjd_ms" in row]
    logs = [math.log(ratio(row)) for row in compared if row["m"] in SUMMARY]
    slower = [row for row in compared if ratio(row) < 0.9]
    names = [f"{row['method']} (m = {row['m']}): {number(ratio(row), 2)}" for row in slower]
    mean = math.exp(sum(logs) / max(1, len(logs)))
    return (
        f"Geometric mean over {len({row['method'] for row in compared})} methods and m = "
        f"{SUMMARY}: {mean:.1f}. Below 0.9: {', '.join(names) or 'nothing'}."
    )


BENCHMARK = Benchmark(
    name="methods",
    about=__doc__,
    cells=cells,
    report=report,
    full={"methods": tuple(PAIRS), "sizes": SIZES, "seconds": 0.6, "device": "cpu"},
    quick={"sizes": (4, 16, 64), "seconds": 0.1},
    choices={"methods": PAIRS, "device": DEVICES},
    draw=_picture.speedups,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
