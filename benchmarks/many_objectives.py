"""Time UPGrad, DualProj and MGDA with as many objectives as a batch has examples.

    OMP_NUM_THREADS=1 python -m benchmarks.many_objectives [--methods upgrad dualproj mgda]
        [--sizes 256 512 ...] [--ratios 4 1 ...] [--device cuda]

Weights from the Gramian of `m` Gaussian gradients in `ratio * m` dimensions: independent and far
from balanced (4), independent and ill-conditioned (1), dependent and close to balanced (0.5),
dependent and balanced (0.125). One run of each, in seconds of the processor: UPGrad, which solves a
problem for each gradient, takes ten minutes. The largest conflict is that of a direction with a row
(for UPGrad, of each projection), relative to both lengths. On a device (`--device cuda`) the second
run of each, in seconds of a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import torchjd_func as jd
from benchmarks._form import DEVICES, Benchmark, Cell, Row, clock, exponent, main, table

SIZES, RATIOS = (256, 512, 1024, 2048), (4.0, 1.0, 0.5, 0.125)
METHODS: dict[str, Callable[[Tensor], jd.linalg.Solution]] = {
    "upgrad": lambda gramian: jd.linalg.dual_cone_projection(
        gramian, torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
    ),
    "dualproj": lambda gramian: jd.linalg.dual_cone_projection(
        gramian, gramian.new_full((len(gramian),), 1 / len(gramian))
    ),
    "mgda": jd.linalg.min_norm_point,
}


def cells(
    methods: Sequence[str], sizes: Sequence[int], ratios: Sequence[float], device: str
) -> list[Cell]:
    """Return all methods at all ratios and sizes."""
    return [
        (f"{name}, n = {ratio:g} m, m = {m}", partial(measure, name, ratio, m, device))
        for name in methods
        for ratio in ratios
        for m in sizes
    ]


def measure(name: str, ratio: float, m: int, device: str) -> Iterator[Row]:
    """Time one method at one size."""
    generator = torch.Generator().manual_seed(m)
    jac = torch.randn(m, max(1, int(ratio * m)), generator=generator, dtype=torch.float64)
    jac = jac.to(device)
    solve = partial(METHODS[name], jac @ jac.mT)
    start = time.process_time()
    solution = solve()
    seconds = time.process_time() - start if device == "cpu" else clock(solve)
    directions = torch.atleast_2d(solution.value) @ jac
    # A projection is no longer than the row, nor the mean or the shortest point than the longest.
    lengths = jac.norm(dim=1)
    largest = lengths[:, None] if name == "upgrad" else lengths.max()
    slopes = directions @ jac.mT / lengths / largest
    yield {
        "method": name,
        "ratio": ratio,
        "m": m,
        "seconds": seconds,
        "converged": float(solution.converged.double().mean()),
        "conflict": max(0.0, float(-slopes.min())),
    }


def report(rows: list[Row]) -> str:
    """Return the seconds at each size, and how they grow, as Markdown."""
    sizes, lines = sorted({row["m"] for row in rows}), []
    for name, ratio in dict.fromkeys((row["method"], row["ratio"]) for row in rows):
        own = [row for row in rows if (row["method"], row["ratio"]) == (name, ratio)]
        seconds = {row["m"]: row["seconds"] for row in own}
        worst = max(row["conflict"] for row in own)
        solved = min(row["converged"] for row in own)
        cells = [seconds.get(m, float("nan")) for m in sizes]
        growth = exponent(own, "m", "seconds")
        line = [name, f"n = {ratio:g} m", *cells, growth, f"{solved:.0%}", f"{worst:.0e}"]
        lines.append(line)
    head = ["method", "gradients", *(f"m = {m}" for m in sizes), "growth", "converged", "conflict"]
    return f"Seconds for the weights:\n\n{table(head, lines, digits=2)}"


BENCHMARK = Benchmark(
    name="many_objectives",
    about=__doc__,
    cells=cells,
    report=report,
    full={"methods": tuple(METHODS), "sizes": SIZES, "ratios": RATIOS, "device": "cpu"},
    quick={"sizes": (64, 128)},
    choices={"methods": tuple(METHODS), "device": DEVICES},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
