"""The table of properties, measured, not claimed.

python -m tests.property_table            # prints it
python -m tests.property_table --write    # puts it into its page
"""

from __future__ import annotations

from tests.matrices import A, matrix
from tests.properties import lowest_conflict, scaling_gap, span_distance
from tests.readme import MANUAL, between, show_or_write
from tests.registry import METHODS, Method, exported, fresh
from torchjd_func import aggregation

PAGE = MANUAL / "explanation/choosing.md"
START, END = "<!-- properties: begin -->", "<!-- properties: end -->"
COLUMNS = (
    "method",
    "non-conflicting",
    "linear under scaling",
    "weighted",
    "permutation-equivariant",
    "needs",
    "state",
    "differentiable",
    "solve grows like",
)


def measure(method: Method) -> dict[str, bool]:
    """Return the properties that hold on every witness."""
    return {
        "non_conflicting": lowest_conflict(method) >= -1e-6,
        "linear_under_scaling": scaling_gap(method) < (1e-6 if method.unique else 1e-4),
        "weighted": span_distance(method) < 1e-6,
    }


def needs(method: Method) -> str:
    """Say what a method looks at."""
    weighting = method.make(max(3, method.min_m)).weighting
    looked = {"size": "m", "norms": "norms", "gramian": "G", "cross_gramian": "two batches"}
    statistic = "rows" if weighting is None else looked[weighting.needs]
    return statistic + (" and losses" if method.needs_losses else "")


def state(method: Method) -> str:
    """Say what a method remembers."""
    m = max(3, method.min_m)
    _, initial = fresh(method, matrix("gaussian", m, A.shape[1]), m)
    fields = set(getattr(initial, "_fields", ()))
    kept = ["memory"] if fields - {"key"} else []
    return ", ".join(kept + ["key"] * ("key" in fields)) or "none"


def row(name: str, method: Method) -> str:
    """Return one line of the table."""
    held = measure(method)
    marks = ["yes" if held[claim] else "no" for claim in held]
    order = "in distribution" if method.random else "yes" if method.equivariant else "no"
    smooth = "yes" if method.differentiable else "no"
    cells = [f"`{name}`", *marks, order, needs(method), state(method), smooth, method.cost]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """Return the whole table in Markdown."""
    plain: dict[str, Method] = {}
    for name, method in METHODS.items():
        if exported(name) in aggregation.__all__:
            plain.setdefault(exported(name), method)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(row(name, method) for name, method in plain.items())])


def inserted(text: str) -> str:
    """Return a page with the table between its marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
