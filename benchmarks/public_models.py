"""Time Gramians of public models of `transformers` against one plain forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.public_models [--quick] [--models GPT2LMHeadModel ...]

One loss for each of 8 examples, with a padding mask for text; random weights, two layers. One
thread; minima of interleaved repeats in one process.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch

import torchjd_func as jd
from benchmarks._form import Benchmark, Cell, Row, main, minima, table
from benchmarks._public_models import NAMES, Scale, build

SCALE = Scale(96, 4, examples=8, tokens=24, words=1000, pixels=32, patch=8, dtype=torch.float32)


def measure(name: str, seconds: float) -> Iterator[Row]:
    """Time one model."""
    transformers = importlib.import_module("transformers")  # takes seconds, and may be missing
    losses, params, batch = build(name, transformers, SCALE)
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    flat, gramian = list(leaves.values()), jd.gramian(jd.instancewise(losses))
    routes = {
        "plain": lambda: torch.autograd.grad(
            losses(leaves, *batch).mean(), flat, allow_unused=True
        ),
        "gramian": lambda: gramian(params, *batch),
    }
    times = minima(routes, seconds)
    yield {"model": name} | {f"{key}_ms": 1e3 * value for key, value in times.items()}


def cells(models: Sequence[str], seconds: float) -> list[Cell]:
    """Return the models."""
    return [(name, partial(measure, name, seconds)) for name in models]


def report(rows: list[Row]) -> str:
    """Return times and ratios as Markdown."""
    lines = [
        [row["model"], row["plain_ms"], row["gramian_ms"], row["gramian_ms"] / row["plain_ms"]]
        for row in rows
    ]
    return table(["model", "plain, ms", "Gramian, ms", "Gramian / plain"], lines)


BENCHMARK = Benchmark(
    name="public_models",
    about=__doc__,
    cells=cells,
    report=report,
    full={"models": tuple(NAMES), "seconds": 3.0},
    quick={"models": ("GPT2LMHeadModel", "ViTForImageClassification"), "seconds": 0.5},
    choices={"models": NAMES},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
