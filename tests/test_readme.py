"""The README holds: two commands first, and every Python block runs."""

import pytest

from tests import readme


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
