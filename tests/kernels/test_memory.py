"""No kernel reads memory that its launch writes, so that no order of its threads matters.

The interpreter, which runs one thread, does not see it where one does.
"""

import ast
from pathlib import Path

import pytest

import torchjd_func

KERNELS = sorted((Path(torchjd_func.__file__).parent / "_kernels").glob("[a-z]*.py"))
# What an earlier launch left, by which a program decides whether there is something to do.
FLAGS = {"STATE", "PIVOTS"}


def pointers(call):
    """Return the arrays, in capitals, that the address of a load or of a store names."""
    names = (node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name))
    return {name for name in names if name.isupper()}


def accesses(function, kind):
    """Return the lines on which a function loads or stores, with the arrays."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    wanted = (call for call in calls if ast.unparse(call.func) == f"tl.{kind}")
    return [(call.lineno, name) for call in wanted for name in sorted(pointers(call))]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_what_is_written_is_not_read(path):
    for function in ast.parse(path.read_text()).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        loads, stores = accesses(function, "load"), accesses(function, "store")
        written = {name for _, name in stores}
        both = [(line, name) for line, name in loads if name in written]
        assert {name for _, name in both} <= FLAGS, function.name
        first = min((line for line, _ in loads), default=0)
        # A branch, or the line before one, ahead of all that is computed.
        assert all(line == first for line, _ in both), function.name
        assert "G" not in written  # which helpers read
