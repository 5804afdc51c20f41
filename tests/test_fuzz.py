"""A seeded run of `python -m tests.fuzz`, and calls with the faults that it is to find."""

import pytest
import torch

from tests.fuzz import Call, draw_call, fault, faults


def test_drawn_calls_return_or_say_what_is_wrong():
    assert faults(1500, seed=1) == []


def test_draws_are_reproducible():
    assert [draw_call(at).shown() for at in range(20)] == [
        draw_call(at).shown() for at in range(20)
    ]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x @ x[None], "RuntimeError|TypeError"),
        (lambda x: x.mul_(2), "changes an argument"),
        (lambda x: torch.rand(3), "global generator"),
        (lambda x: x + 1, None),
    ],
)
def test_a_fault_is_found(fn, message):
    found = fault(Call("mine", fn, (torch.ones(3),)))
    assert (found is None) == (message is None)
    assert message is None or any(part in found for part in message.split("|"))
