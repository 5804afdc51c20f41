"""The table of papers, from the docstrings, and what other libraries call a method.

python -m tests.paper_table            # prints it
python -m tests.paper_table --write    # puts it into its page
"""

from __future__ import annotations

import inspect
import re
from operator import attrgetter
from typing import NamedTuple

import torchjd_func as jd
from tests.readme import MANUAL, between, show_or_write
from torchjd_func import aggregation, combinators

PAGE = MANUAL / "howto/migrating.md"
START, END = "<!-- papers: begin -->", "<!-- papers: end -->"
# What TorchJD 0.18 and LibMTL call a method; "" where only the other one has it.
ELSEWHERE = {
    "aligned_mtl": ("AlignedMTL", "Aligned_MTL"),
    "cagrad": ("CAGrad", "CAGrad"),
    "config": ("ConFIG", ""),
    "constant": ("Constant", ""),
    "db_mtl": ("", "DB_MTL"),
    "dualproj": ("DualProj", ""),
    "excess_mtl": ("ExcessMTL", "ExcessMTL"),
    "fairgrad": ("FairGrad", "FairGrad"),
    "graddrop": ("GradDrop", "GradDrop"),
    "gradnorm": ("", "GradNorm"),
    "gradvac": ("GradVac", "GradVac"),
    "imtl_g": ("IMTLG", "IMTL"),
    "krum": ("Krum", ""),
    "mean": ("Mean", ""),
    "mgda": ("MGDA", "MGDA"),
    "moco": ("", "MoCo"),
    "modo": ("MoDoWeighting", "MoDo"),
    "nash_mtl": ("NashMTL", "Nash_MTL"),
    "pcd": ("PCD", ""),
    "pcgrad": ("PCGrad", "PCGrad"),
    "rlw": ("Random", "RGW"),
    "sdmgrad": ("SDMGradWeighting", "SDMGrad"),
    "smoothed": ("CRMOGMWeighting", ""),
    "sum": ("Sum", "EW"),
    "trimmed_mean": ("TrimmedMean", ""),
    "upgrad": ("UPGrad", "UPGrad"),
    "scalarizers.constant": ("Constant", ""),
    "scalarizers.cosmos": ("COSMOS", ""),
    "scalarizers.dwa": ("DWA", "DWA"),
    "scalarizers.famo": ("FAMO", "FAMO"),
    "scalarizers.geometric_mean": ("GeometricMean", "GLS"),
    "scalarizers.imtl_l": ("IMTLL", "IMTL"),
    "scalarizers.mean": ("Mean", ""),
    "scalarizers.pbi": ("PBI", ""),
    "scalarizers.random": ("Random", "RLW"),
    "scalarizers.stch": ("STCH", "STCH"),
    "scalarizers.sum": ("Sum", "EW"),
    "scalarizers.uw": ("UW", "UW"),
}
METHODS = (
    *aggregation.__all__,
    *combinators.__all__,
    *(f"scalarizers.{name}" for name in jd.scalarizers.__all__),
    *(f"sets.{name}" for name in jd.sets.__all__ if name != "SetRule"),
)


class Paper(NamedTuple):
    """Where a method is from."""

    author: str  # the first
    year: str
    link: str


def papers(name: str) -> list[Paper]:
    """Return the references in the docstring of a method that have a link."""
    doc = inspect.getdoc(attrgetter(name)(jd)) or ""
    text = " ".join(doc.split("References:")[1].split("Example:")[0].split())
    found, start = [], 0
    for link in re.finditer(r"https://\S+?(?=[.;,]?(?:\s|$))", text):
        entry = re.split(r"(?<=\d{4})\. ", text[start : link.start()])[-1]
        author = re.search(r"(?:[A-Z]\.[- ]?)+ ?([A-Z][\w-]+)", entry)
        years = re.findall(r"\b(?:19|20)\d\d\b", entry)
        if author and years:
            found.append(Paper(author[1], years[-1], link[0]))
        start = link.end()
    return found


def row(name: str) -> str:
    """Return one line of the table."""
    cited = [f"[{author} {year}]({link})" for author, year, link in papers(name)]
    others = [f"`{other}`" if other else "" for other in ELSEWHERE.get(name, ("", ""))]
    return "| " + " | ".join([f"`jd.{name}`", ", ".join(cited), *others]) + " |"


def table() -> str:
    """Return the whole table in Markdown."""
    columns = ("method", "paper", "TorchJD", "LibMTL")
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *map(row, METHODS)])


def inserted(text: str) -> str:
    """Return a page with the table between its marks."""
    return between(text, START, END, table())


if __name__ == "__main__":
    show_or_write(__doc__, PAGE, table, inserted)
