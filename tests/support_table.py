"""The table of what runs where; `tests/differentiate/test_modules.py` tests it.

python -m tests.support_table            # prints it
python -m tests.support_table --write    # puts it into its page
"""

from __future__ import annotations

from tests.modules import CASES, MODES, ROUTES, Case
from tests.readme import MANUAL, between, show_or_write

PAGE = MANUAL / "explanation/support.md"
START, END = "<!-- support table: start -->", "<!-- support table: end -->"


def cell(case: Case, route: str) -> str:
    """Say what happens on one route."""
    eager, compiled = (case.message(route, mode) is None for mode in MODES)
    if not eager:
        return "error"
    if not compiled:
        return "eager"
    return "slow" if route in case.slow else "yes"


def cost(case: Case) -> str:
    """Say what the route layer by layer works with."""
    if case.message("layerwise", "eager") is not None:
        return ""
    return "rows" if case.rows else "factors"


def row(name: str, case: Case) -> str:
    """Return one line of the table."""
    cells = [cell(case, route) for route in ROUTES]
    return "| " + " | ".join([name, *cells, cost(case), case.instead]) + " |"


def table() -> str:
    """Return the whole table in Markdown."""
    columns = ["what", *(f"`{route}`" for route in ROUTES), "works with", "instead"]
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(row(name, case) for name, case in CASES.items())])


def inserted(text: str) -> str:
    """Return a page with the table between its marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
