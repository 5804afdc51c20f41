"""The three numbers of the README, from the committed results of the benchmarks.

python -m tests.headline            # prints them
python -m tests.headline --write    # puts them into the README
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benchmarks import _form
from tests.readme import README, between, show_or_write

PAGE = README
START, END = "<!-- headline: begin -->", "<!-- headline: end -->"


def span(values: Iterable[float]) -> str:
    """Return the lowest and the highest number, with two digits."""
    known = sorted(value for value in values if math.isfinite(value))
    return f"{_form.number(known[0], 2)} to {_form.number(known[-1], 2)}"


def quotients(rows: list[dict[str, Any]], above: str, below: str) -> list[float]:
    """Return the quotients of two times, of the rows that have both."""
    return [row[above] / row[below] for row in rows if above in row and below in row]


def networks() -> dict[str, list[dict[str, Any]]]:
    """Return the times of one loss per example, for up to 256 examples, by model."""
    rows = [row for row in _form.load("gramian") if row.get("b", 0) <= 256]
    return {
        model: [r for r in rows if r["model"] == model] for model in ("mlp", "cnn", "transformer")
    }


def table() -> str:
    """Return the numbers in Markdown."""
    by = networks()
    every = [row for rows in by.values() for row in rows]
    peer = {
        model: span(quotients(rows, "autogram_ms", "layerwise_ms")) for model, rows in by.items()
    }
    upgrad = {
        row["m"]: row["torchjd_ms"] / row["ours_ms"]
        for row in _form.load("methods")
        if row["method"] == "upgrad" and "torchjd_ms" in row
    }
    weights = ", ".join(f"{_form.number(upgrad[m], 2)} at m = {m}" for m in (4, 16, 64, 256))
    lines = [
        (
            "Gramian of one loss per example, in plain passes",
            span(quotients(every, "layerwise_ms", "plain_ms")),
        ),
        ("the same, TorchJD's time / ours", "; ".join(f"{k} {v}" for k, v in peer.items())),
        ("weights of UPGrad, TorchJD's time / ours", weights),
    ]
    return "\n".join(
        ["| on a CPU | |", "|---|---|", *(f"| {what} | {value} |" for what, value in lines)]
    )


def inserted(text: str) -> str:
    """Return a page with the table between its marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
