"""The manual as a site: every public name is there once, with its text, and nothing is fetched."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from mkdocstrings import Inventory

from tests.readme import MANUAL, PAGES, ROOT
from tests.test_public_api import NAMESPACES, PUBLIC

LISTED = re.findall(
    r"^::: (\S+)", "\n".join(path.read_text() for path in PAGES.values()), re.MULTILINE
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_every_public_name_has_one_entry():
    modules = {space.__name__ for space in NAMESPACES} - {"torchjd_func"}
    own = {
        f"{space.__name__}.{name}"
        for space in NAMESPACES
        for name in space.__all__
        if not inspect.ismodule(getattr(space, name))
    }
    assert set(LISTED) == own | modules
    assert len(LISTED) == len(set(LISTED))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    folder = PAGES[page].parent
    assert not [link for link in LINK.findall(text) if not (folder / link).exists()]


def fields(kind: type) -> Iterator[tuple[str, str]]:
    """Return what a reader sees of a record: its fields, with their text."""
    for name in getattr(kind, "_fields", ()):
        yield name, inspect.getsource(kind).partition(f"\n    {name}: ")[2].partition('"""')[2]
    if dataclasses.is_dataclass(kind):
        text = (inspect.getdoc(kind) or "").split("Attributes:")[1]
        for field in dataclasses.fields(kind):
            yield field.name, text.partition(f"\n    {field.name}: ")[2]


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(PUBLIC[name])])
def test_every_field_has_its_text(name):
    assert not [field for field, text in fields(PUBLIC[name]) if len(text) < 4]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The manual, built; what is not found is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-f",
        MANUAL / "site/mkdocs.yml",
        "-d",
        folder,
    ]
    calm = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=calm, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_site_holds_what_it_says(site):
    with (site / "objects.inv").open("rb") as file:
        there = set(Inventory.parse_sphinx(file, domain_filter=["py"]))
    assert set(LISTED) <= there

    pages = {path: path.read_text() for path in site.rglob("*.html")}
    sources = [*MANUAL.rglob("*.md"), *MANUAL.rglob("*.ipynb")]
    assert len(pages) == len(sources) + 1, "and one for what is not found"
    fetched = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="?(?:https?:)?//[^">]+')
    assert not {
        str(path): fetched.findall(text) for path, text in pages.items() if fetched.search(text)
    }
    assert sum(text.count("<math") for text in pages.values()) > 200

    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    for word, page in (
        ("UPGrad", "explanation/choosing"),
        ("autocast", "howto/mixed_precision"),
        ("nash_mtl", "reference/aggregators"),
    ):
        assert any(
            word in entry["title"] + entry["text"]
            for entry in entries
            if entry["location"].startswith(page)
        )
