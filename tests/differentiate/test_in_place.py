"""Parameters that go into other tensors in place have factors, as those that are added have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchjd_func as jd
from tests.differentiate.test_layerwise_kinds import rand
from tests.programs import by_loops

PLACES = torch.arange(3)[None]
SIZES = ((4, 2), (3, 4), (4,))


def added(p: Any, h: Tensor) -> Tensor:
    h += p[1]
    return h


def looked_up(p: Any, h: Tensor) -> Tensor:
    h += F.embedding(PLACES, p[1])
    return h


def to_a_slice(p: Any, h: Tensor) -> Tensor:
    h[..., 1:, :] += p[2]
    h[..., 1:].mul_(p[2][1:])
    return h


def several(p: Any, h: Tensor) -> Tensor:
    return h.mul_(p[2]).add_(p[1], alpha=-2).sub_(p[2].exp().sum())


def twice(p: Any, h: Tensor) -> Tensor:
    return F.linear(h.add_(p[2]), p[1]).add_(p[1][0, :3])


def unseen(p: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        h.add_(p[2])
    return h


WRITES: dict[str, Callable[..., Tensor]] = {
    "added": added,
    "looked up, and added": looked_up,
    "to a slice": to_a_slice,
    "several": several,
    "twice": twice,
    "divided": lambda p, h: h.div_(2 + p[2].cos()),
    "raised": lambda p, h: (1 * h.exp()).pow_(p[2]),
    "clamped": lambda p, h: h.clamp_(min=p[2]),
    "between": lambda p, h: h.lerp_(p[1], 0.3),
    "with products": lambda p, h: h.addcmul_(p[1], p[2], value=0.5),
    "without autograd": unseen,
}


def objective(name: str) -> Callable[..., Tensor]:
    """Return losses of which nothing needs what was there before."""

    def fn(p: Any, x: Tensor) -> Tensor:
        return WRITES[name](p, 1 * F.linear(x, p[0])).sin().flatten(-2).sum(-1)

    return fn


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_in_place_costs_no_rows(name):
    fn, params, x = objective(name), [rand(*size, seed=1) for size in SIZES], rand(5, 3, 2)
    instances = jd.instancewise(fn)
    for batch in (x, 2 * x, x[:1], x):
        rows = by_loops(fn, params, batch)
        _, gramian, vjp_fn = jd.gramian_vjp(instances, params, batch)
        torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)
        flat = torch.cat([grad.flatten() for grad in vjp_fn(torch.ones_like(rows[:, 0]))])
        torch.testing.assert_close(flat, rows.sum(0), rtol=1e-9, atol=1e-11)
    report = jd.explain_gramian(instances, params, x)
    assert [line.path for line in report.leaves if line.contraction == "m backward passes"] == []
    torch._dynamo.reset()
    compiled = torch.compile(jd.gramian(instances), backend="aot_eager", fullgraph=True)
    rows = by_loops(fn, params, x)
    torch.testing.assert_close(compiled(params, x), rows @ rows.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_in_place_for_one_example(name):
    fn, params, x = objective(name), [rand(*size, seed=1) for size in SIZES], rand(5, 3, 2)
    if name == "looked up, and added":
        pytest.skip("its places are of a batch")
    gramian = jd.gramian(jd.per_example(fn, in_dims=(None, 0)))
    rows = by_loops(lambda p, x: torch.stack([fn(p, one) for one in x]), params, x)
    torch.testing.assert_close(gramian(params, x), rows @ rows.T, rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()
    compiled = torch.compile(gramian, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, x), rows @ rows.T, rtol=1e-9, atol=1e-11)


def test_what_torch_refuses_to_write_is_refused():
    params, x = [rand(3, seed=1)], torch.ones(4, 3, dtype=torch.long)

    def fn(p: Any, x: Tensor) -> Tensor:
        return x.clone().add_(p[0]).sum(1)

    with pytest.raises(RuntimeError, match="can't be cast"):
        jd.gramian(jd.instancewise(fn))(params, x)
