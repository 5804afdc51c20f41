"""The README as data: its shell commands and its Python blocks.

python tests/readme.py command 2    # prints the second shell command
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """Return the contents of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Return the shell blocks, each one command."""
    return [block.strip() for block in blocks("sh")]


def between(text: str, start: str, end: str, content: str) -> str:
    """Return a README with other content between two marks."""
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def show_or_write(
    usage: str | None, table: Callable[[], str], inserted: Callable[[str], str]
) -> None:
    """Print a table, or put it into the README, as the arguments of the command say."""
    if sys.argv[1:] == ["--write"]:
        README.write_text(inserted(README.read_text()))
    elif sys.argv[1:]:
        raise SystemExit(usage)
    else:
        print(table())


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "command":
        raise SystemExit(__doc__)
    print(commands()[int(sys.argv[2]) - 1])
