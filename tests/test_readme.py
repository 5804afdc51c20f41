"""The README holds: two commands first, and every Python block runs."""

import pytest
import torch

from tests import property_table, readme, support_table, test_compile, test_contract, test_vmap
from tests.registry import METHODS, Method


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


def test_the_table_of_what_runs_where_is_up_to_date():
    text = readme.README.read_text()
    message = "run `python -m tests.support_table --write`"
    assert support_table.inserted(text) == text, message


@pytest.mark.parametrize("name", METHODS)
def test_measured_properties_are_the_claimed_ones(name):
    measured = property_table.measure(METHODS[name])
    assert measured == {claim: getattr(METHODS[name], claim) for claim in measured}


def test_a_method_of_ones_own_passes_the_contracts(monkeypatch):
    (block,) = [block for block in readme.blocks("python") if "def shortened" in block]
    assert block.count("\n") <= 15
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    method = Method(lambda m: namespace["shortened"](), degree=0.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        test_contract.test_dtype_in_is_dtype_out(method, dtype)
    for route in ("jacobian", "product"):
        test_contract.test_gramian_route_equals_jacobian_route(method, route)
    rest = vars(test_contract).items()
    contracts = [
        fn for name, fn in rest if name.startswith("test_") and fn.__code__.co_argcount == 1
    ]
    assert len(contracts) >= 10
    for contract in contracts:
        contract(method)
    monkeypatch.setitem(METHODS, "own", method)
    test_compile.test_three_steps_are_one_graph("own")
    test_vmap.test_vmap_equals_loop("own")
