"""The README and the pages of the manual as data: shell commands, Python blocks, tables.

python tests/readme.py command 2    # prints the README's second shell command
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
README, MANUAL = ROOT / "README.md", ROOT / "notebooks"
PAGES = {str(path.relative_to(ROOT)): path for path in (README, *sorted(MANUAL.rglob("*.md")))}


def blocks(language: str, path: pathlib.Path = README) -> list[str]:
    """Return the contents of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path: pathlib.Path = README) -> list[str]:
    """Return the shell blocks, each one command."""
    return [block.strip() for block in blocks("sh", path)]


def prose() -> str:
    """Return the README and all pages as one text."""
    return "\n".join(path.read_text() for path in PAGES.values())


def between(text: str, start: str, end: str, content: str) -> str:
    """Return a page with other content between two marks."""
    before, rest = text.split(start)
    return f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def show_or_write(
    usage: str | None,
    page: pathlib.Path,
    table: Callable[[], str],
    inserted: Callable[[str], str],
) -> None:
    """Print a table, or put it into its page, as the arguments of the command say."""
    if sys.argv[1:] == ["--write"]:
        page.write_text(inserted(page.read_text()))
    elif sys.argv[1:]:
        raise SystemExit(usage)
    else:
        print(table())


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "command":
        raise SystemExit(__doc__)
    print(commands()[int(sys.argv[2]) - 1])
