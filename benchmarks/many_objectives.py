"""Time UPGrad with as many objectives as a batch has examples.

    OMP_NUM_THREADS=1 python -m benchmarks.many_objectives [--sizes 256 512 ...] [--ratios 4 1 ...]

Weights from the Gramian of `m` Gaussian gradients in `ratio * m` dimensions: independent and far
from balanced (4), independent and ill-conditioned (1), dependent and close to balanced (0.5). Rows
that balance take longest. One run of each; the largest conflict is that of a projection with a row,
relative to both lengths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

import torchjd_func as jd
from benchmarks._form import Benchmark, Cell, Row, exponent, main, table

SIZES, RATIOS = (256, 512, 1024), (4.0, 1.0, 0.5)


def cells(sizes: Sequence[int], ratios: Sequence[float]) -> list[Cell]:
    """Return all sizes at all ratios."""
    work = [(ratio, m) for ratio in ratios for m in sizes]
    return [(f"n = {ratio:g} m, m = {m}", partial(measure, ratio, m)) for ratio, m in work]


def measure(ratio: float, m: int) -> Iterator[Row]:
    """Time one size."""
    generator = torch.Generator().manual_seed(m)
    jac = torch.randn(m, int(ratio * m), generator=generator, dtype=torch.float64)
    gramian = jac @ jac.mT
    start = time.perf_counter()
    solution = jd.linalg.dual_cone_projection(gramian, torch.eye(m, dtype=torch.float64))
    seconds = time.perf_counter() - start
    norms = jac.norm(dim=1)
    slopes = (solution.value @ gramian) / norms / norms[:, None]
    yield {
        "ratio": ratio,
        "m": m,
        "seconds": seconds,
        "converged": float(solution.converged.double().mean()),
        "conflict": max(0.0, float(-slopes.min())),
    }


def report(rows: list[Row]) -> str:
    """Return the seconds at each size, and how they grow, as Markdown."""
    sizes, lines = sorted({row["m"] for row in rows}), []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        own = [row for row in rows if row["ratio"] == ratio]
        seconds = {row["m"]: row["seconds"] for row in own}
        worst = max(row["conflict"] for row in own)
        solved = min(row["converged"] for row in own)
        cells = [seconds.get(m, float("nan")) for m in sizes]
        growth = exponent(own, "m", "seconds")
        lines.append([f"n = {ratio:g} m", *cells, growth, f"{solved:.0%}", f"{worst:.0e}"])
    head = ["gradients", *(f"m = {m}" for m in sizes), "growth", "converged", "conflict"]
    return f"Seconds for the weights:\n\n{table(head, lines, digits=2)}"


BENCHMARK = Benchmark(
    name="many_objectives",
    about=__doc__,
    cells=cells,
    report=report,
    full={"sizes": SIZES, "ratios": RATIOS},
    quick={"sizes": (64, 128)},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
