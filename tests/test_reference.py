"""The reference that pdoc makes: every public name has its text, every formula arrives."""

import dataclasses
import html
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pdoc import doc, docstrings, render_helpers

from tests.test_public_api import NAMESPACES, PUBLIC

FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$]+?\$", re.DOTALL)


def members(space: Any) -> Iterator[tuple[str, doc.Doc[Any]]]:
    """Return what pdoc shows of a module, and of its classes."""
    module = doc.Module(space)
    yield "", module
    for name in space.__all__:
        if inspect.ismodule(getattr(space, name)):
            continue
        member = module.members[name]
        yield name, member
        if isinstance(member, doc.Class):
            fields = [part for part in member.own_members if not part.name.startswith("_")]
            yield from ((f"{name}.{part.name}", part) for part in fields)


@pytest.mark.parametrize("space", NAMESPACES, ids=lambda space: space.__name__)
def test_every_name_and_every_field_has_its_text(space):
    bare = [name for name, member in members(space) if not described(space, name, member)]
    assert not bare


def described(space: Any, name: str, member: doc.Doc[Any]) -> bool:
    """Tell whether a name has a text: its own, or that of a field in its dataclass."""
    kind = getattr(space, name.split(".")[0], None)
    if isinstance(member, doc.Variable) and dataclasses.is_dataclass(kind):
        return f"\n    {member.name}: " in (inspect.getdoc(kind) or "").split("Attributes:")[1]
    return len(member.docstring) > 3 and not member.docstring.startswith("Alias for field")


@pytest.mark.parametrize("name", PUBLIC)
def test_formulas_arrive_as_they_are(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    page = html.unescape(render_helpers.to_html(docstrings.convert(text, "google", None)))
    formulas = [" ".join(formula.split()) for formula in FORMULA.findall(text)]
    missing = [formula for formula in formulas if formula not in " ".join(page.split())]
    assert not missing
