"""What MkDocs does not do: pictures of the benchmarks, and formulas without a script.

Formulas become MathML when the site is built, so that nothing is fetched when it is read.
"""

from __future__ import annotations

import html
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results"

# Of Markdown by arithmatex, and of notebooks, where nbconvert leaves the dollars.
MARKED = re.compile(r'<(span|div) class="arithmatex">\s*\\[\[(](.*?)\\[\])]\s*</\1>', re.DOTALL)
DOLLARS = re.compile(r"\$\$(.+?)\$\$|\$([^$\s](?:[^$]*[^$\s])?)\$", re.DOTALL)
VERBATIM = re.compile(
    r"(<pre\b.*?</pre>|<code\b.*?</code>|<script\b.*?</script>|<style\b.*?</style>|<[^>]+>)",
    re.DOTALL,
)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pictures, which are not among the pages."""
    for path in RESULTS.glob("*.png"):
        name = f"benchmarks/results/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point to them: pages are one folder less deep in the site than in the repository."""
    return markdown.replace("](../../benchmarks/", "](../benchmarks/")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace the formulas of a page."""
    content = MARKED.sub(lambda found: mathml(found[2], found[1] == "div"), content)
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    pieces = VERBATIM.split(content)  # text, and at odd places what is not
    return "".join(x if i % 2 else DOLLARS.sub(_dollars, x) for i, x in enumerate(pieces))


def _dollars(found: re.Match[str]) -> str:
    """Return one formula of a notebook."""
    return mathml(found[1] or found[2], found[1] is not None)


def mathml(formula: str, block: bool) -> str:
    """Return a formula as browsers draw it; what is not understood is an error."""
    known = html.unescape(formula).replace(r"\arg", r"\operatorname{arg}")
    found = convert(known, display="block" if block else "inline")
    if "\\" in found:
        raise ValueError(f"a formula must be understood by latex2mathml, got {formula!r}")
    return found
