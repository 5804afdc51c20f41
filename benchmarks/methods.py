"""Time each method against the object-oriented peer, over the number of objectives m.

    OMP_NUM_THREADS=1 python -m benchmarks.methods [--sizes 2 4 8 ...] [--methods upgrad ...]

Weights from the Gramian of Gaussian gradients in 4 m dimensions, and, for methods that need the
rows, the direction from an m x 10,000 matrix, with the memory it takes. Eager, one thread; minima
of interleaved repeats in one process. Methods that need cvxpy in the peer are timed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchjd.aggregation as peer
from torch.func import vmap
from tqdm import tqdm

import torchjd_func as jd
from benchmarks import _memory, _picture

RESULTS = pathlib.Path(__file__).parent / "results"
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
N_PARAMS, N_GROUPS = 10_000, 200
N_INPUTS, SECONDS = 3, 0.6  # distinct inputs, and time for each pair and size


def minima(functions: Sequence[Callable[[Any], Any]], inputs: list[Any]) -> list[float]:
    """Return the shortest mean time over the inputs of each function, in seconds, interleaved."""
    best, spent = [math.inf] * len(functions), 0.0
    while spent < SECONDS or math.inf in best:
        for index, fn in enumerate(functions):
            start = time.perf_counter()
            for value in inputs:
                fn(value)
            elapsed = time.perf_counter() - start
            best[index] = min(best[index], elapsed / len(inputs))
            spent += elapsed
    return best


def matrices(m: int, n: int) -> list[torch.Tensor]:
    """Draw the inputs."""
    generator = torch.Generator().manual_seed(m)
    return [torch.randn(m, n, generator=generator) for _ in range(N_INPUTS)]


def measure(name: str, m: int) -> dict[str, Any]:
    """Time one method at one size; with the memory if it needs the rows."""
    make, make_peer = PAIRS[name]
    aggregator, other = make(m), make_peer(m) if make_peer else None
    jacobians = matrices(m, N_PARAMS if name in ROWS else 4 * m)
    state = aggregator.init(jacobians[0], key=jd.random.key(0))
    rule: Any = aggregator if name in ROWS else aggregator.weighting
    inputs = jacobians if name in ROWS else [jac @ jac.mT for jac in jacobians]
    functions = [lambda x: rule(x, state), *([other] if other else [])]
    times = dict(zip(("ours_ms", "torchjd_ms"), minima(functions, inputs), strict=False))
    row = {"method": name, "m": m} | {key: 1e3 * value for key, value in times.items()}
    if name in ROWS:
        peaks = (_memory.peak(fn, inputs[0]) / inputs[0].nbytes for fn in functions)
        row |= dict(zip(("ours_memory", "torchjd_memory"), peaks, strict=False))
    return row


def groups() -> tuple[float, float]:
    """Return the time of UPGrad for 200 groups of 8 objectives: one call, and 200 of the peer."""
    jacobians = torch.randn(N_GROUPS, 8, 32, generator=torch.Generator().manual_seed(0))
    weighting = jd.upgrad().weighting
    assert weighting is not None
    together, other = vmap(lambda gramian: weighting(gramian)[0]), peer.UPGradWeighting()
    functions = [together, lambda gramians: [other(gramian) for gramian in gramians]]
    ours, theirs = minima(functions, [jacobians @ jacobians.mT])
    return ours, theirs


def ratio(row: dict[str, Any]) -> float:
    """Return the peer's time over ours; not-a-number where there is no peer."""
    return row.get("torchjd_ms", math.nan) / row["ours_ms"]


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """Fit `a` in `time ~ m^a` to the sizes from 16 on."""
    points = [(row["m"], row[key]) for row in rows if row["m"] >= 16 and key in row]
    if len(points) < 2:
        return math.nan
    logs = np.log(np.array(points))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def table(rows: list[dict[str, Any]]) -> str:
    """Return ratios, growth and memory as Markdown; dashes where there is nothing to compare."""
    sizes = sorted({row["m"] for row in rows})
    head = [*(f"m = {m}" for m in sizes), "growth", "TorchJD's", "memory", "TorchJD's"]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = {row["m"]: row for row in rows if row["method"] == name}
        last = own[max(own)]
        cells = [ratio(own[m]) if m in own else math.nan for m in sizes]
        cells += [exponent([*own.values()], key) for key in ("ours_ms", "torchjd_ms")]
        cells += [last.get(key, math.nan) for key in ("ours_memory", "torchjd_memory")]
        lines.append(f"| `{name}` | " + " | ".join(map(digits, cells)) + " |")
    return "\n".join(lines)


def digits(value: float) -> str:
    """Return two digits of a number."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the geometric mean of the ratios, and where we are slower."""
    compared = [row for row in rows if "torchjd_ms" in row]
    logs = [math.log(ratio(row)) for row in compared if row["m"] in SUMMARY]
    slower = [row for row in compared if ratio(row) < 0.9]
    names = [f"{row['method']} (m = {row['m']}): {digits(ratio(row))}" for row in slower]
    mean = math.exp(sum(logs) / max(1, len(logs)))
    return (
        f"Geometric mean over {len({row['method'] for row in compared})} methods and m = "
        f"{SUMMARY}: {mean:.1f}. Below 0.9: {', '.join(names) or 'nothing'}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table of ratios, save all numbers and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--methods", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "methods.json")
    options = parser.parse_args(arguments)
    if min(options.sizes) < 2:
        parser.error(f"argument --sizes: must be at least 2, got {min(options.sizes)}")
    torch.set_num_threads(1)
    work = [(n, m) for n in options.methods for m in options.sizes if m >= LEAST.get(n, 2)]
    rows = [measure(name, m) for name, m in tqdm(work, unit="cell")]
    print(f"TorchJD's time divided by ours, torch {torch.__version__}, {platform.machine()}.")
    print("Growth: fitted exponent of m. Memory: peak over the size of the matrix, largest m.\n")
    print(table(rows), f"\n{summary(rows)}", sep="\n")
    if "upgrad" in options.methods:
        ours, theirs = groups()
        print(f"UPGrad, {N_GROUPS} groups of 8: {1e3 * ours:.2f} ms, {theirs / ours:.0f} times.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"Picture: {_picture.growth(rows, options.out.with_suffix('.png'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
