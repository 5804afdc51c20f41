"""Public operations of torch between a linear layer and losses: every route equals plain loops.

The rules by which torch maps an operation, or its backward pass, over a batch may be wrong: then
the results of all routes must still be right, or an error must say what to do.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchjd_func as jd
from tests.operations import OPERATIONS, Operation, fixed
from tests.programs import by_loops

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:index_reduce"),
]

GENERATOR = torch.Generator().manual_seed(1)
PARAMS = [
    torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR),
    torch.randn(4, dtype=torch.float64, generator=GENERATOR),
]
X = torch.randn(3, 3, 3, dtype=torch.float64, generator=GENERATOR)
# Whose backward passes torch 2.13 does not map over losses, and operations that it does not map
NOT_OVER_LOSSES = {"complex product", "fft.hfft"}
NOT_OVER_EXAMPLES = {"gaussian_nll_loss", "group_norm", "lstm cell", "RNN", "GRU", "LSTM"}
if torch.__version__ >= "2.15":  # which maps it (2.13 does not; 2.14 was not tried)
    NOT_OVER_EXAMPLES.discard("group_norm")


def flat(operation: Operation, p: Any, x: Tensor, *front: int) -> Tensor:
    """Return what an operation makes of a linear layer, as real numbers."""
    out = operation(F.linear(x, *p))
    out = out[0] if isinstance(out, tuple) else out
    out = torch.view_as_real(out.resolve_conj()) if out.is_complex() else out
    return out.reshape(*front, -1)


def losses_of(operation: Operation) -> dict[str, Callable[..., Tensor]]:
    """Return losses of examples, losses without examples, and the loss of one example."""

    def examples(p: Any, x: Tensor) -> Tensor:
        out = flat(operation, p, x, len(x))
        return (out * fixed(out.shape[1])).sum(1) + out.sin().sum(1)

    def plain(p: Any, x: Tensor) -> Tensor:
        out = flat(operation, p, x[0])
        return fixed(5, len(out)) @ out + out.sin().sum()

    def one(p: Any, x: Tensor) -> Tensor:
        out = flat(operation, p, x)
        return out @ fixed(len(out)) + out.sin().sum()

    return {"examples": examples, "plain": plain, "one": one}


def assert_rows(fn: Any, rows: Tensor, chunk_size: int | None = None) -> None:
    """Compare Jacobian, Gramians by all routes and norms with rows."""
    options: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10 * float(rows.abs().max())}
    squares: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10 * float(rows.square().sum())}
    jac = jd.jac(fn, chunk_size=chunk_size)(PARAMS, X)
    torch.testing.assert_close(torch.cat([leaf.flatten(1) for leaf in jac], 1), rows, **options)
    for route in ("jacobian", "layerwise"):
        found = jd.gramian(fn, route=route, chunk_size=chunk_size)(PARAMS, X)
        torch.testing.assert_close(found, rows @ rows.mT, **squares)
    norms = jd.row_norms(fn, chunk_size=chunk_size)(PARAMS, X)
    torch.testing.assert_close(norms, rows.norm(dim=1), **options)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_route_equals_loops(name: str) -> None:
    if name == "aminmax" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 has no derivative of aminmax")
    fns = losses_of(OPERATIONS[name])
    for kind, objective in (
        ("examples", jd.instancewise(fns["examples"])),
        ("plain", fns["plain"]),
    ):
        rows = by_loops(fns[kind], PARAMS, X)
        if name in NOT_OVER_LOSSES:
            with pytest.raises(ValueError, match="Pass chunk_size=1"):
                assert_rows(objective, rows)
        assert_rows(objective, rows, 1 if name in NOT_OVER_LOSSES else None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_that_are_mapped_over_examples_equal_loops(name: str) -> None:
    one = losses_of(OPERATIONS[name])["one"]
    objective = jd.per_example(one)
    if name in NOT_OVER_EXAMPLES:
        with pytest.raises(ValueError, match=r"jd\.instancewise"):
            jd.gramian(objective, route="jacobian")(PARAMS, X)
        return
    rows = by_loops(lambda p, x: torch.stack([one(p, row) for row in x]), PARAMS, X)
    assert_rows(objective, rows, 1 if name in NOT_OVER_LOSSES else None)


def test_prelu_that_is_mapped_twice_equals_loops() -> None:
    """Over seeds and over losses; with as many of both, torch's own rule is wrong in silence."""
    weights = torch.stack([0.3 * PARAMS[0], PARAMS[0].cos()])
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=GENERATOR)

    def losses(w: Tensor, x: Tensor) -> Tensor:
        return (F.prelu(F.linear(x, w), w[:, 0]).sin() * w.sum(1)).flatten(1).sum(1)

    for fn, route in (
        (losses, "jacobian"),
        (losses, "layerwise"),
        (jd.instancewise(losses), "auto"),
    ):
        found = torch.vmap(jd.gramian(fn, route=route), in_dims=(0, None))(weights, x)
        for matrix, w in zip(found, weights, strict=True):
            rows = by_loops(lambda p, x: losses(p[0], x), [w], x)
            torch.testing.assert_close(matrix, rows @ rows.mT, rtol=1e-8, atol=1e-10)


def test_frequencies_of_indices_are_those_of_an_example() -> None:
    index, table = torch.tensor([[0, 1, 1], [2, 2, 2], [0, 0, 2]]), X[0]

    def one(p: Any, i: Tensor) -> Tensor:
        return F.embedding(i, p[0], scale_grad_by_freq=True).sin().sum()

    rows = by_loops(lambda p, i: torch.stack([one(p, row) for row in i]), [table], index)
    for route in ("jacobian", "layerwise"):
        found = jd.gramian(jd.per_example(one), route=route)([table], index)
        torch.testing.assert_close(found, rows @ rows.mT, rtol=1e-8, atol=1e-10)


def test_operations_that_are_spelled_out_compile() -> None:
    """Methods and functions of one name take their arguments in different forms."""
    index, one = torch.tensor([[0, 1], [2, 2], [1, 0]]), torch.tensor(1)

    def losses(p: Any, i: Tensor) -> Tensor:
        h = F.embedding(i, p[0], scale_grad_by_freq=True) * p[0].index_select(0, one)
        h = torch.flip(h, (1,)) + h.flip(1).roll(1, -1) + torch.roll(h, (1,), (2,))
        h = F.prelu(h, p[1][:1]).select_scatter(h[:, 0].cos(), 1, -1)
        h = torch.index_add(h, 1, one, h[:, :1].sin())
        return (torch.cdist(h, p[0]).sum(2) + h.unflatten(2, (3, 1)).sum((2, 3))).sum(1)

    objective = jd.instancewise(losses)
    want = jd.gramian(objective)(PARAMS, index)
    compiled = torch.compile(jd.gramian(objective), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(PARAMS, index), want, rtol=1e-9, atol=1e-11)
