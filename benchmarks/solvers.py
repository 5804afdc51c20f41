"""Take a census of the quadratic solver: what is solved, how exactly, and by which path.

    python -m benchmarks.solvers [--sizes 2 3 5 ...] [--problems 10000]

Problems are `min z'Qz/2 + q'z` over `z >= 0` with `Q = J J^T`, for J of every kind below, and `q`
in the range of Q, so that a minimum exists. The residual is that of the optimality conditions,
relative, after scaling to a unit diagonal; it is computed here, not taken from the solver.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import torchjd_func as jd
from benchmarks._form import Benchmark, Cell, Row, main, table

SIZES = (2, 3, 5, 8, 16, 32, 64)
KINDS = ("wide", "square", "low rank", "duplicate", "opposite", "zero", "scaled", "integer")


class Census(NamedTuple):
    """What came of a number of problems of one size."""

    problems: int
    converged: float  # share that the solver calls solved
    solved: float  # share whose residual is below 1e-8
    worst: float  # largest residual
    fallback: float  # share that took the exact path
    seconds: float  # for each problem


def jacobians(kind: str, count: int, m: int, generator: torch.Generator) -> Tensor:
    """Draw matrices `(count, m, n)` of one kind."""
    n = {"wide": 4 * m, "low rank": (m + 1) // 2}.get(kind, m)
    rows = torch.randn(count, m, n, dtype=torch.float64, generator=generator)
    if kind == "scaled":  # lengths from 1e-6 to 1e6
        uniform = torch.rand(count, m, 1, dtype=torch.float64, generator=generator)
        return rows * 10 ** (12 * uniform - 6)
    if kind == "integer":  # ties, and rows that repeat
        return rows.mul(1.5).round()
    partner = {"duplicate": 2.0, "opposite": -3.0, "zero": 0.0}.get(kind)
    return rows if partner is None else torch.cat([rows[:, :-1], partner * rows[:, :1]], dim=1)


def residuals(matrix: Tensor, vector: Tensor, z: Tensor) -> Tensor:
    """Return `max|min(y, slope)| / (1 + max y)`, for a unit diagonal and `max|q| = 1`."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    size = (vector * scale).abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    slope = ((matrix @ z.unsqueeze(-1)).squeeze(-1) + vector) * scale / size
    y = z / scale / size
    return torch.minimum(y, slope).abs().amax(-1) / (1 + y.abs().amax(-1))


def census(m: int, problems: int, seed: int = 0) -> Census:
    """Solve `problems` problems of size `m`, as many of each kind."""
    generator = torch.Generator().manual_seed(1000 * seed + m)
    count = -(-problems // len(KINDS))
    rows = [jacobians(kind, count, m, generator) for kind in KINDS]
    matrix = torch.cat([jac @ jac.mT for jac in rows])
    inside = torch.randn(len(matrix), m, 1, dtype=torch.float64, generator=generator)
    vector = (matrix @ inside).squeeze(-1)
    start = time.perf_counter()
    solution = jd.linalg.nnqp(matrix, vector)
    seconds = (time.perf_counter() - start) / len(matrix)
    residual = residuals(matrix, vector, solution.value)
    return Census(
        len(matrix),
        float(solution.converged.double().mean()),
        float((residual < 1e-8).double().mean()),
        float(residual.max()),
        float(solution.fallback.double().mean()),
        seconds,
    )


def cells(sizes: Sequence[int], problems: int) -> list[Cell]:
    """Return the sizes."""
    return [(f"m = {m}", partial(measure, m, problems)) for m in sizes]


def measure(m: int, problems: int) -> Iterator[Row]:
    """Take the census of one size."""
    yield {"m": m, **census(m, problems)._asdict()}


def report(rows: list[Row]) -> str:
    """Return one line for each size, as Markdown."""
    head = ["m", "problems", "called solved", "residual < 1e-8", "worst", "fallback", "us each"]
    lines = []
    for m, problems, converged, solved, worst, fallback, seconds in map(dict.values, rows):
        shares = [f"{share:.2%}" for share in (converged, solved, fallback)]
        lines.append([m, problems, *shares[:2], f"{worst:.1e}", shares[2], 1e6 * seconds])
    return f"Kinds: {', '.join(KINDS)}.\n\n{table(head, lines)}"


BENCHMARK = Benchmark(
    name="solvers",
    about=__doc__,
    cells=cells,
    report=report,
    full={"sizes": SIZES, "problems": 10_000},
    quick={"problems": 1_000},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
