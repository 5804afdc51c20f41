"""Each option of each factory, given values of all types: taken so that it works, or refused."""

# Wrong types are the point here.
# pyright: reportArgumentType=false

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests import registry, scalarizer_registry
from tests.wrong import (
    ARGUMENTS,
    OPTIONS,
    RULES,
    SCALARIZERS,
    VALUES,
    M,
    called,
    complaint,
    option_complaint,
)

GIVEN = [registry.METHODS[name] for name in RULES]
GIVEN += [scalarizer_registry.METHODS[name] for name in SCALARIZERS]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[".".join(pair) for pair in OPTIONS])
def test_an_option_works_or_is_refused(name, option):
    complaints = {label: option_complaint(name, option, value) for label, value in VALUES.items()}
    assert {label: text for label, text in complaints.items() if text} == {}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("method", GIVEN, ids=[*RULES, *(f"scalarizers.{s}" for s in SCALARIZERS)])
def test_an_argument_works_or_is_refused(method, argument):
    rule = method.make(M)
    complaints = {
        label: complaint(lambda value=value: called(rule, argument, value))
        for label, value in VALUES.items()
    }
    assert {label: text for label, text in complaints.items() if text} == {}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: jd.cagrad("0.5"), TypeError, "`c` must be a number.*got '0.5'.*float"),
        (lambda: jd.cagrad(-1.0), ValueError, r"`c` must be in \[0, inf\), got -1.0"),
        (lambda: jd.imtl_g(safe="no"), TypeError, "`safe` must be True or False"),
        (lambda: jd.upgrad(object()), TypeError, "`preference` must be 1-D.*got object"),
        (lambda: jd.upgrad([1.0, float("nan")]), ValueError, "`preference`.*nan"),
        (lambda: jd.cagrad(torch.tensor(-1.0)), ValueError, r"`c` must be in \[0, inf\), got -1.0"),
        (lambda: jd.upgrad(torch.tensor([1.0, -1.0])), ValueError, "`preference`.*got -1.0"),
        (lambda: jd.dualproj({"a": 1.0, "b": torch.tensor(-1.0)}), ValueError, "got -1.0"),
        (
            lambda: jd.upgrad([0, 0.0]),
            ValueError,
            r"`preference` must hold a positive number.*0\.0",
        ),
        (lambda: jd.config({"a": 0.0, "b": 0.0}), ValueError, "`preference` must hold a positive"),
        (lambda: jd.dualproj(torch.zeros(2)), ValueError, "`preference` must hold a positive"),
        (lambda: jd.constant([1.0, -torch.inf]), ValueError, r"`weights` must be in \(-inf, inf\)"),
        (lambda: jd.epo(torch.tensor([1.0, torch.nan])), ValueError, "`preference`.*got nan"),
        (lambda: jd.clipped_mean(torch.tensor(torch.nan)), ValueError, "`max_norm`.*got nan"),
        (lambda: jd.krum(1.0), ValueError, "`n_byzantine` must be an int"),
        (lambda: jd.graddrop(f=3), TypeError, "`f` must be a function"),
    ],
)
def test_an_error_says_what_came_and_what_to_do(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


PREFERRED = [
    jd.upgrad,
    jd.dualproj,
    jd.config,
    jd.aligned_mtl,
    jd.geometric_median,
    jd.epo,
    jd.pmgda,
]


@pytest.mark.parametrize("factory", PREFERRED)
def test_a_preference_that_is_not_read_and_not_a_number_is_seen_in_the_result(factory):
    jac = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])

    def step(preference):
        return factory(preference)(jac, losses=torch.ones(2))[0]

    good = torch.tensor([0.3, 0.7])
    found = vmap(step)(torch.stack([good, torch.tensor([torch.nan, 0.7])]))
    torch.testing.assert_close(found[0], step(good))
    assert found[1].isnan().all()


@pytest.mark.parametrize("by_name", [False, True])
def test_numbers_that_change_are_captured(by_name):
    point = torch.tensor([1.0, -3.0])

    def losses(x):
        return {"b": x.square().sum(), "a": (x - 1).abs().sum()}

    def step(share):
        shares = {"a": share, "b": 1 - share} if by_name else [share, 1 - share]
        return jd.grad(losses, jd.upgrad(shares))(None, point)[0]

    fast = torch.compile(step, fullgraph=True, backend="eager")
    for share in (0.25, 0.5, 0.75):
        torch.testing.assert_close(fast(share), step(share))


NUMBERS = {
    "cagrad": jd.cagrad,
    "fairgrad": lambda value: jd.fairgrad(value + 0.5),
    "smoothed": lambda value: jd.smoothed(jd.mgda(), value),
    "stch": lambda value: jd.scalarizers.stch(value + 0.1),
    "upgrad": lambda value: jd.upgrad([value + 0.1, 1 - value]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_change_in_a_compiled_step(name):
    """It compiles again."""

    def objective(params, x):
        return (x @ params).square().mean(0) + 0.1

    def step(params, x, value):
        return jd.grad(objective, NUMBERS[name](value))(None, params, x)[0]

    params, x = torch.randn(3, 2).double(), torch.randn(5, 3).double()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for value in (0.0, 0.25, 0.5):
        torch.testing.assert_close(compiled(params, x, value), step(params, x, value))


@pytest.mark.parametrize("route", ["auto", "layerwise", "product"])
def test_sizes_may_change_in_a_compiled_step(route):
    def objective(params, x):
        return (x @ params).square().mean(0)

    step = jd.grad_and_value(objective, jd.upgrad(), route=route)
    params = torch.randn(3, 2).double()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for size in (8, 3, 5):
        x = torch.randn(size, 3).double()
        for got, expected in zip(compiled((), params, x), step((), params, x), strict=True):
            torch.testing.assert_close(got, expected)
