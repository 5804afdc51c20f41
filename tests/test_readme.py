"""The README holds: two commands first, and every Python block runs."""

import pytest

from tests import property_table, readme
from tests.registry import METHODS


def test_the_first_two_shell_blocks_are_one_command_each():
    first, second = readme.commands()[:2]
    for command in (first, second):
        assert "\n" not in command.replace("\\\n", "")
        assert "venv" in command
        assert "install" in command
    assert "benchmarks.digits" in first
    assert "pytest" in second


@pytest.mark.parametrize("block", readme.blocks("python"))
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_table_of_properties_is_up_to_date():
    text = readme.README.read_text()
    message = "run `python -m tests.property_table --write`"
    assert property_table.inserted(text) == text, message


@pytest.mark.parametrize("name", METHODS)
def test_measured_properties_are_the_claimed_ones(name):
    measured = property_table.measure(METHODS[name])
    assert measured == {claim: getattr(METHODS[name], claim) for claim in measured}
