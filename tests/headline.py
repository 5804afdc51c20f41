"""The three numbers of the README, from the committed results of the benchmarks.

python -m tests.headline            # prints them
python -m tests.headline --write    # puts them into the README
"""

from __future__ import annotations

from tests.readme import README, between, show_or_write
from tests.times import Column, columns, peer, plain, upgrad

PAGE = README
START, END = "<!-- headline: begin -->", "<!-- headline: end -->"
WHAT = {
    "Gramian of one loss per example, in plain passes": plain,
    "the same, TorchJD's time / ours": peer,
    "weights of UPGrad, TorchJD's time / ours": upgrad,
}


def table() -> str:
    """Return the numbers in Markdown, a column for each device."""
    every: list[Column] = columns()
    head = ["| | " + " | ".join(column.title for column in every) + " |", "|---" * (len(every) + 1)]
    lines = [
        f"| {what} | " + " | ".join(number(column) for column in every) + " |"
        for what, number in WHAT.items()
    ]
    return "\n".join([head[0], head[1] + "|", *lines])


def inserted(text: str) -> str:
    """Return a page with the table between its marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
