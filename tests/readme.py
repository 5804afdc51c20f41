"""The README as data: its shell commands and its Python blocks.

python tests/readme.py command 2    # prints the second shell command
"""

from __future__ import annotations

import pathlib
import re
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """Return the contents of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Return the shell blocks, each one command."""
    return [block.strip() for block in blocks("sh")]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "command":
        raise SystemExit(__doc__)
    print(commands()[int(sys.argv[2]) - 1])
