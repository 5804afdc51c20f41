"""The README and the manual hold: two commands first, every Python block runs, tables are true."""

import ast
import re
import subprocess
import sys
import warnings
from operator import attrgetter
from types import ModuleType

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization

import torchjd_func as jd
from tests import (
    claims_table,
    cost_table,
    headline,
    method_entries,
    paper_table,
    property_table,
    readme,
    support_table,
)
from tests.readme import MANUAL, PAGES
from tests.registry import METHODS

OWN = MANUAL / "howto/write_your_own.md"
PROCESSES = MANUAL / "howto/several_processes.md"
# What a page may use, and the tests do not install.
OPTIONAL = {"peft", "pytorch_lightning", "torchjd", "torchopt", "transformers"}


def test_the_first_two_shell_blocks_are_one_command_each():
    first, second = readme.commands()[:2]
    for command in (first, second):
        assert "\n" not in command.replace("\\\n", "")
        assert "venv" in command
        assert "install" in command
    assert "benchmarks.digits" in first
    assert "pytest" in second


def test_the_readme_is_short():
    assert len(readme.README.read_text().split()) <= 1200


def test_two_processes_train():
    (command,) = [line for line in readme.commands(PROCESSES) if "data_parallel" in line]
    arguments = command.partition("torchrun ")[2].split()
    run = [sys.executable, "-m", "torch.distributed.run", *arguments, "--steps", "3", "--eager"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert "step    2: first" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_are_named_are_there(page):
    text = PAGES[page].read_text()
    files = re.findall(r"\b(?:tests|benchmarks|torchjd_func|notebooks)/[\w/.]+\.\w+", text)
    modules = re.findall(r"-m ((?:tests|benchmarks)(?:\.\w+)*)", text)
    paths = [readme.ROOT / name for name in files if "yours" not in name]
    paths += [(readme.ROOT / name.replace(".", "/")) for name in modules]
    missing = [path for path in paths if not (path.exists() or path.with_suffix(".py").exists())]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if readme.blocks("python", PAGES[page])])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = ModuleType("page")  # in `sys.modules`, where torch.compile looks functions up
    monkeypatch.setitem(sys.modules, "page", module)
    try:
        for block in readme.blocks("python", PAGES[page]):
            run(block, page, vars(module))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(block, page, namespace):
    """Execute a block, if the packages that it imports are there."""
    others = OPTIONAL & imported(block)
    for name in others:
        pytest.importorskip(name)
    with warnings.catch_warnings():
        if others:  # they warn of themselves
            warnings.simplefilter("ignore")
        exec(compile(block, page, "exec"), namespace)


def imported(block: str) -> set[str]:
    """Return the names of the packages that a block imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE))


def test_every_name_is_there():
    names = re.findall(r"\bjd\.([a-z_A-Z]+(?:\.[a-z_A-Z]+)*)", readme.prose())
    assert len(set(names)) > 80
    for name in set(names):
        attrgetter(name)(jd)


def test_inline_code_is_python():
    rows = [line for line in readme.prose().splitlines() if line.startswith("| ")]
    snippets = [code for line in rows for code in line.split("`")[1::2] if "(" in code]
    assert len(snippets) > 60
    for code in snippets:
        compile(code, code, "exec")


def test_inline_rules_can_be_made():
    known = {"jd": jd, "rule": jd.mgda(), "k": 3, "measures": {"cosine": jd.measures.min_cosine}}
    known |= dict.fromkeys(("weights", "preference", "scores", "p"), torch.tensor([0.5, 0.5]))
    made = 0
    for code in sorted(set(re.findall(r"`(jd\.[^`\n]+\))`", readme.prose()))):
        names = {x.id for x in ast.walk(ast.parse(code)) if isinstance(x, ast.Name)}
        if names <= set(known) and "(...)" not in code:
            eval(code, known)
            made += 1
    assert made > 40


@pytest.mark.parametrize(
    "table",
    [
        claims_table,
        cost_table,
        headline,
        method_entries,
        paper_table,
        property_table,
        support_table,
    ],
)
def test_tables_are_up_to_date(table):
    text = table.PAGE.read_text()
    assert table.inserted(text) == text, f"run `python -m {table.__name__} --write`"


def test_every_method_of_the_peer_is_listed():
    bases = ("Aggregator", "GramianWeightedAggregator", "Scalarizer", "WeightedAggregator")
    for space, prefix in ((torchjd.aggregation, ""), (torchjd.scalarization, "scalarizers.")):
        of_space = [
            k for k in paper_table.ELSEWHERE if k.startswith("scalarizers.") == bool(prefix)
        ]
        listed = {paper_table.ELSEWHERE[name][0] for name in of_space} - {""}
        assert listed <= set(space.__all__)
        methods = {name for name in space.__all__ if name not in (*bases, "Weighting")}
        assert {name.removesuffix("Weighting") for name in methods} == {
            name.removesuffix("Weighting") for name in listed
        }


def test_papers_are_read_from_docstrings():
    assert paper_table.papers("mgda") == [
        ("Desideri", "2012", "https://doi.org/10.1016/j.crma.2012.03.014"),
        ("Sener", "2018", "https://arxiv.org/abs/1810.04650"),
    ]
    without = [name for name in paper_table.METHODS if not paper_table.papers(name)]
    assert without == ["scalarizers.power_mean"]  # a book


@pytest.mark.parametrize("name", METHODS)
def test_measured_properties_are_the_claimed_ones(name):
    measured = property_table.measure(METHODS[name])
    assert measured == {claim: getattr(METHODS[name], claim) for claim in measured}


def test_every_method_of_ones_own_is_checked_and_used():
    text = "\n".join(readme.blocks("python", OWN))
    factories = re.findall(r"^def ([a-z]\w*)\(\w+=|^def ([a-z]\w*)\(\)", text, re.MULTILINE)
    names = {first or second for first, second in factories}
    assert len(names) == 4
    assert set(re.findall(r"jd\.testing\.check\((\w+)\(\)", text)) == names
    assert set(re.findall(r"jd\.grad\(objective, (\w+)\(\)", text)) == names
