"""The entries of the reference for methods: docstring, guarantees as measured, papers, names.

python -m tests.method_entries            # prints them
python -m tests.method_entries --write    # puts them into their page
"""

from __future__ import annotations

from tests import paper_table, property_table
from tests.readme import MANUAL, between, show_or_write

PAGE = MANUAL / "reference/aggregators.md"
START, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def entry(name: str, line: str) -> str:
    """Return one method: where its docstring goes, its row, its papers and other names."""
    cells = line.split("|", 2)[2]
    columns = " | ".join(property_table.COLUMNS[1:])
    rule = "|---" * (len(property_table.COLUMNS) - 1) + "|"
    cited = [f"[{author} {year}]({link})" for author, year, link in paper_table.papers(name)]
    pairs = zip(("TorchJD", "LibMTL"), paper_table.ELSEWHERE.get(name, ("", "")), strict=True)
    names = [f"in {library} `{other}`" for library, other in pairs if other]
    facts = "; ".join([*cited, *names])
    return f"::: torchjd_func.{name}\n\n| {columns} |\n{rule}\n|{cells}\n\n{facts}\n"


def table() -> str:
    """Return all entries, from the table of properties as it stands on its page."""
    text = property_table.PAGE.read_text()
    measured = text.split(property_table.START)[1].split(property_table.END)[0]
    rows = [line for line in measured.splitlines() if line.startswith("| `")]
    return "\n".join(entry(row.split("`")[1], row) for row in rows).rstrip()


def inserted(text: str) -> str:
    """Return a page with the entries between their marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
