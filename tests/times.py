"""What the manual says of times, read from the committed results of the benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks import _form

Rows = list[dict[str, Any]]
MODELS = {"mlp": "MLP", "cnn": "CNN", "transformer": "transformer"}
LARGEST = 256  # examples; beyond, the solve for the weights is most of a step
SIZES = (4, 16, 64, 256)


class Column(NamedTuple):
    """Where times are from: a device, eager or as a CUDA graph."""

    title: str
    suffix: str  # of the files
    graph: bool


def columns() -> list[Column]:
    """Return the CPU, and each card that has results."""
    found = [Column("CPU, one thread", "", False)]
    for path in sorted(_form.RESULTS.glob("methods-*.json")):
        card, suffix = json.loads(path.read_text())["card"], path.stem.removeprefix("methods")
        found += [Column(card, suffix, False), Column(f"{card}, CUDA graph", suffix, True)]
    return found


def plain(column: Column) -> str:
    """Return the time of the Gramian, in forward and backward passes."""
    end = "_graph_ms" if column.graph else "_ms"
    every = [row for rows in networks(column).values() for row in rows]
    return span(quotients(every, "layerwise" + end, "plain" + end))


def peer(column: Column) -> str:
    """Return the peer's time for the Gramian over ours."""
    if column.graph:
        return "-"
    by = networks(column).items()
    named = [(MODELS[k], span(quotients(rows, "autogram_ms", "layerwise_ms"))) for k, rows in by]
    return ", ".join(f"{name} {value}" for name, value in named if value != "-") or "-"


def upgrad(column: Column) -> str:
    """Return the peer's time for the weights of UPGrad over ours."""
    ours = "graph_ms" if column.graph else "ours_ms"
    rows = {row["m"]: row for row in load("methods", column) if row["method"] == "upgrad"}
    there = [m for m in SIZES if {"torchjd_ms", ours} <= set(rows.get(m, ()))]
    pairs = [(_form.number(rows[m]["torchjd_ms"] / rows[m][ours], 2), m) for m in there]
    return ", ".join(f"{value} at m = {m}" for value, m in pairs)


def networks(column: Column) -> dict[str, Rows]:
    """Return the times of one loss per example by model."""
    rows = [row for row in load("gramian", column) if row.get("b", 0) <= LARGEST]
    return {model: [row for row in rows if row["model"] == model] for model in MODELS}


def load(name: str, column: Column) -> Rows:
    """Return the rows of a benchmark on a device; none, if there is no result."""
    there = (_form.RESULTS / f"{name}{column.suffix}.json").exists()
    return _form.load(name + column.suffix) if there else []


def quotients(rows: Rows, above: str, below: str) -> list[float]:
    """Return the quotients of two times, of the rows that have both."""
    return [row[above] / row[below] for row in rows if above in row and below in row]


def span(values: Iterable[float]) -> str:
    """Return the lowest and the highest number, or the only one, with two digits."""
    known = [_form.number(value, 2) for value in sorted(values) if math.isfinite(value)]
    ends = dict.fromkeys([known[0], known[-1]] if known else ["-"])
    return " to ".join(ends)
