"""Docstrings of this library as mkdocstrings reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

DISPLAYED = re.compile(r"^( *)(\$\$.+?\$\$)$", re.DOTALL | re.MULTILINE)


class Sections(griffe.Extension):
    """Give sections and formulas the form that mkdocstrings knows."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of a function, a class or a module."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = DISPLAYED.sub(r"\n\1\2\n", text)  # a paragraph of its own
