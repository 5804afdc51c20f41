"""The table of what can be claimed in `jd.testing.check`: the fields of `Case`.

python -m tests.claims_table            # prints it
python -m tests.claims_table --write    # puts it into its page
"""

from __future__ import annotations

import dataclasses
import inspect
import re

from tests.readme import MANUAL, between, show_or_write
from torchjd_func.testing import Case

PAGE = MANUAL / "howto/write_your_own.md"
START, END = "<!-- claims table: start -->", "<!-- claims table: end -->"


def meanings() -> dict[str, str]:
    """Return what the docstring of `Case` says of each field."""
    text = (inspect.getdoc(Case) or "").split("Attributes:")[1]
    listed = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in listed}


def table() -> str:
    """Return the whole table in Markdown."""
    said = meanings()
    fields = [field for field in dataclasses.fields(Case) if field.name != "make"]
    rows = [f"| `{x.name}` | `{x.default!r}` | {said[x.name]} |" for x in fields]
    return "\n".join(["| claim | default | meaning |", "|---|---|---|", *rows])


def inserted(text: str) -> str:
    """Return a page with the table between its marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
