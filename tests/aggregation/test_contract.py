"""What every method promises, whatever it computes: the checks of `jd.testing`, on all methods."""

from dataclasses import replace

import pytest
import torch

import torchjd_func as jd
from tests.matrices import B
from tests.registry import METHODS
from torchjd_func.testing import CHECKS
from torchjd_func.testing._contract import other_state

PAIRS = [
    pytest.param(method, CHECKS[check], id=f"{check}-{name}")
    for name, method in METHODS.items()
    for check in CHECKS
    if CHECKS[check].applies(method)
]


@pytest.mark.parametrize(("method", "check"), PAIRS)
def test_contract(method, check, device):
    check(replace(method, device=device))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_wrong_use_is_a_clear_error(method, device):
    case = replace(method, device=device)
    rule, state = case.start(case.sample())
    with pytest.raises(ValueError, match="state"):
        other_state(case)()
    if method.random:
        with pytest.raises(ValueError, match=r"jd\.random\.key"):
            rule.init(case.sample())
    if method.needs_losses:
        with pytest.raises(ValueError, match=r"losses=\.\.\."):
            rule(case.sample(), state)


def test_rows_are_counted_in_leaf_order():
    losses = {"b": lambda x: x.sum(), "a": lambda x: x.prod()}
    x = torch.tensor([2.0, 3.0])
    got = jd.jac(lambda x: {name: fn(x) for name, fn in losses.items()})(x)
    assert torch.equal(got, torch.tensor([[3.0, 2.0], [1.0, 1.0]]))


def test_gramian_accumulates_in_float32_or_better():
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = B[0].to(dtype)
        assert jd.gramian(lambda x: B.to(x.dtype) @ x)(x).dtype == want
