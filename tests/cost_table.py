"""The tables of times of the manual, from the committed results of the benchmarks.

python -m tests.cost_table            # prints them
python -m tests.cost_table --write    # puts them into their page
"""

from __future__ import annotations

from benchmarks import _form, methods
from tests.readme import MANUAL, between, show_or_write
from tests.times import MODELS, Column, columns, load, networks, quotients, span

PAGE = MANUAL / "explanation/costs.md"
START, END = "<!-- times: begin -->", "<!-- times: end -->"
KEYS = (
    ("Gramian, in plain passes", "layerwise", "plain"),
    ("`autogram`'s time / ours", "autogram", "layerwise"),
    ("UPGrad step, in plain passes", "step", "plain"),
    ("TorchJD's step / ours", "step_torchjd", "step"),
)


def examples(column: Column) -> str:
    """Return the times of one loss per example, by network."""
    end = "_graph_ms" if column.graph else "_ms"
    lines = [
        [
            MODELS[model],
            *(span(quotients(rows, above + end, below + end)) for _, above, below in KEYS),
        ]
        for model, rows in networks(column).items()
    ]
    return _form.table(["network", *(title for title, _, _ in KEYS)], lines)


def weights(column: Column) -> str:
    """Return the peer's time for the weights over ours, by method and size."""
    rows = load("methods", column)
    if column.graph:
        rows = [row | {"ours_ms": row["graph_ms"]} for row in rows if "graph_ms" in row]
    return methods.ratios(rows)


def table() -> str:
    """Return both tables for each device."""
    parts = []
    for column in columns():
        parts += [f"### {column.title}", "One loss for each example:", examples(column)]
        parts += ["Weights alone, TorchJD's time / ours:", weights(column)]
    return "\n\n".join(part.strip() for part in parts)


def inserted(text: str) -> str:
    """Return a page with the tables between their marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
