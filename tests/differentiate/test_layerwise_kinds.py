"""What objectives do that a tracer may miss: each kind in several variants, against plain loops."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

import torchjd_func as jd
from tests.programs import Doubled, by_loops

B = 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers in float64."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Kind(NamedTuple):
    """Losses `fn(params, *batch)`, the shapes of parameters, and whether the proof refuses it."""

    fn: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    batch: tuple[Tensor, ...] = (rand(B, 2),)
    warns: bool = False


def total(h: Tensor) -> Tensor:
    """Return one loss for each example."""
    return h.sin().flatten(1).sum(1)


# Written by index


def written_token(p: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 2, 2, dtype=x.dtype)
    h[:, 0] = p[0]
    h[:, 1] = x
    return total(F.linear(h, p[1]).prod(1))


def written_slice(p: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 3)
    h[:, :2].copy_(x)
    h[:, 2:] = p[0]
    return total(h.square())


def written_weight(p: Any, x: Tensor) -> Tensor:
    w = p[0].clone()
    w[0, 0] = 0.5
    return total(F.linear(x, w))


def masked_in_place(p: Any, x: Tensor) -> Tensor:
    w = p[0] * 1
    return total(F.linear(x, w.masked_fill_(w > 0, 0.3)))


def written_after_its_use(p: Any, x: Tensor) -> Tensor:
    w = p[0].clone()
    first = (x.unsqueeze(1) * w).sum(2)
    w = w.clone()
    w.mul_(2)
    return total(first + F.linear(x, w))


def scattered(p: Any, x: Tensor) -> Tensor:
    return total(torch.zeros_like(x).index_put((torch.arange(len(x)),), x * p[0]))


def doubled(h: Tensor) -> Tensor:
    return h.mul_(2)


def first_replaced(h: Tensor) -> Tensor:
    h[:, 0] = 0.5
    return h


def slice_doubled(h: Tensor) -> Tensor:
    h[..., 1:].mul_(2)
    return h


def added_to(h: Tensor) -> Tensor:
    h += torch.ones_like(h)
    return h


USED = {  # some of which return views
    "einsum": lambda p, x: torch.einsum("bti,ji->btj", x, p[0]),
    "einsum of features": lambda p, x: torch.einsum("bti,ji->btj", F.linear(x, p[0]), p[0]),
    "einsum of products": lambda p, x: torch.einsum("bti,ji->btj", x, p[0] * 3),
    "tensordot": lambda p, x: torch.tensordot(x, p[0], 1),
    "inner": lambda p, x: torch.inner(x, p[0]),
    "linear": lambda p, x: F.linear(x, p[0]),
    "matmul": lambda p, x: x @ p[0].T,
    "mul": lambda p, x: x * p[0][0],
    "expanded": lambda p, x: p[0].expand(len(x), 2, 2) * 1,
}
OVERWRITTEN = {
    f"{name} then {write.__name__}": (use, write)
    for name, use in USED.items()
    for write in (doubled, first_replaced, slice_doubled, added_to)
}


# Grad mode, hooks, functions of one's own


def frozen(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = p[0].abs().sum()
    return total(F.linear(x, p[0] * scale))


def target_network(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.linear(x, p[0]).tanh()
    return (F.linear(x.cos(), p[0]) - target).square().sum(1)


def detached(p: Any, x: Tensor) -> Tensor:
    return total(F.linear(x, p[0].detach()) * F.linear(x, p[0]))


def straight_through(p: Any, x: Tensor) -> Tensor:
    return total(F.linear(x, p[0] + (p[0].round() - p[0]).detach()))


def partly_enabled(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = F.linear(x, p[0])
        with torch.enable_grad():
            g = F.linear(x, p[0])
    return total(h * g)


def hooked_weight(p: Any, x: Tensor) -> Tensor:
    v = p[0] * 1
    if v.requires_grad:
        v.register_hook(lambda g: -g)
    return total(F.linear(x, v))


def hooked_after_its_use(p: Any, x: Tensor) -> Tensor:
    v = p[0] * 1
    h = F.linear(x, v)
    if v.requires_grad:
        v.register_hook(lambda g: 2 * g)
    return total(h)


def hooked_output(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p[0])
    if h.requires_grad:
        h.register_hook(lambda g: g * 2)
    return total(F.linear(h, p[1]))


def own_function_of_weights(p: Any, x: Tensor) -> Tensor:
    return total(F.linear(x, Doubled.apply(p[0])))


def own_function_of_features(p: Any, x: Tensor) -> Tensor:
    return total(F.linear(Doubled.apply(F.linear(x, p[0])), p[1]))


# Where the examples are


def over(
    move: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    """Return losses whose examples are moved before a layer, and back after it."""
    return lambda p, x: total(back(F.linear(move(x), p[0]).tanh()).flatten(1))


AXES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "repeat": (lambda x: x.repeat(2, 1), lambda h: h.view(2, -1, 2).cos().sum(0)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), lambda h: h.view(B, 2, -1).sum(1)),
    "vstack": (lambda x: torch.vstack([x, x.cos()]), lambda h: h[:B] * h[B:]),
    "row_stack": (lambda x: torch.row_stack([x, x.cos()]), lambda h: h[:B] * h[B:]),
    "cat by name": (lambda x: torch.cat(tensors=(x, -x), dim=0), lambda h: h[:B] * h[B:].cos()),
    "flipud": (lambda x: x.flipud(), lambda h: h.flip([0])),
    "pad": (lambda x: F.pad(x, (0, 0, 2, 1)), lambda h: h[2:-1]),
    "index_add": (
        lambda x: x.new_zeros(2 * B, 2).index_add(0, torch.tensor([4, 0, 2]), x),
        lambda h: h[[4, 0, 2]],
    ),
    "index_copy": (
        lambda x: x.new_zeros(B, 2).index_copy(0, torch.tensor([1, 2, 0]), x),
        lambda h: h[[1, 2, 0]],
    ),
    "roll": (lambda x: x.roll(1, 0), lambda h: h.roll(-1, 0)),
    "permute by name": (
        lambda x: torch.permute(input=x[:, None], dims=(1, 0, 2)),
        lambda h: h.squeeze(0),
    ),
    "transpose by name": (
        lambda x: torch.transpose(input=x[:, None], dim0=0, dim1=1),
        lambda h: torch.swapaxes(h, axis0=0, axis1=1),
    ),
    "movedim by name": (
        lambda x: torch.movedim(input=x[:, None], source=0, destination=1),
        lambda h: h.moveaxis(source=1, destination=0),
    ),
    "windows": (
        lambda x: x[:, None].expand(B, 4, 2).reshape(B, 2, 2, 2).reshape(2 * B, 2, 2),
        lambda h: h.view(B, -1),
    ),
    "time first, flattened": (
        lambda x: x[None].expand(B, B, 2).reshape(-1, 2),
        lambda h: h.view(B, B, -1).sum(0),
    ),
}
MIXED = ("repeat", "flipud", "roll")


def assembled(p: Any, x: Tensor) -> Tensor:
    """Lose the examples in a list, beside another axis of their number."""
    h = vmap(lambda row: F.linear(row, p[0]))(x)
    rows = torch.stack([h[i].tanh() for i in range(len(h))], 1)
    return F.linear(rows.T, p[1]).square().sum(1)


def merged_by_position(p: Any, x: Tensor) -> Tensor:
    return total(x.masked_scatter(x > 0, p[0].flatten()))


def last_token(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p[0]).tanh()
    return total(F.linear(h[torch.arange(len(x)), torch.tensor([1, 0, 2])], p[1]))


def added_to_nodes(p: Any, x: Tensor) -> Tensor:
    """A graph of each example, with the same edges."""
    source, target = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    messages = F.linear(x[:, source], p[0]).tanh()
    return total(F.linear(torch.zeros_like(x).index_add(1, target, messages), p[1]))


def experts(p: Any, x: Tensor) -> Tensor:
    weights = F.linear(x, p[1]).softmax(-1)
    first, second = (weights[..., k : k + 1] * F.linear(x, p[0][k]) for k in range(2))
    return total(first + second)


def positions(p: Any, x: Tensor) -> Tensor:
    return total(F.linear(x + F.embedding(torch.arange(x.shape[1]).unsqueeze(0), p[1]), p[0]))


def padded(p: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores = F.linear(x, p[0]) @ x.mT
    scores = scores.masked_fill(~mask[:, None, :], -1e9)
    bias = mask[torch.arange(len(x))[:, None], torch.arange(x.shape[1])]
    return total(scores.softmax(-1) @ F.linear(x, p[1]) * bias.unsqueeze(-1))


SEQUENCE = rand(B, B, 2)
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
BATCHES: dict[str, Kind] = {  # of matrices, with one that `expand` repeats, or one for each head
    "bmm": Kind(lambda p, x: total(torch.bmm(x, p[0].expand(len(x), 2, 2))), ((2, 2),)),
    "bmm of 1": Kind(lambda p, x: total(torch.bmm(x, p[0].expand(len(x), -1, -1))), ((1, 2, 3),)),
    "bmm of rows": Kind(lambda p, x: total(torch.bmm(x, p[0].expand(len(x), 2, 3))), ((3,),)),
    "bmm from the left": Kind(
        lambda p, x: total(torch.bmm(p[0].expand(size=(len(x), 2, B)), x)), ((2, B),)
    ),
    "bmm by name": Kind(
        lambda p, x: total(torch.bmm(mat2=p[0].expand(len(x), 2, 2), input=x)), ((2, 2),)
    ),
    "bmm of parts": Kind(
        lambda p, x: total(
            torch.bmm(x.reshape(-1, 1, 2), p[0].expand(B * len(x), 2, 2)).view(len(x), -1)
        ),
        ((2, 2),),
    ),
    "bmm of heads": Kind(
        lambda p, x: total(torch.bmm(x.transpose(0, 1), p[0]).transpose(0, 1)), ((B, 2, 3),)
    ),
    "matmul": Kind(lambda p, x: total(x @ p[0].expand(len(x), 2, 2)), ((2, 2),)),
    "matmul of 1": Kind(lambda p, x: total(x @ p[0]), ((1, 2, 2),)),
    "matmul from the left": Kind(lambda p, x: total(p[0] @ x), ((1, 2, B),)),
    "matmul of heads": Kind(
        lambda p, x: total((x.transpose(0, 1) @ p[0]).transpose(0, 1)), ((B, 2, 2),)
    ),
    "matmul of experts": Kind(
        lambda p, x: total((x.reshape(-1, 2).expand(4, -1, 2) @ p[0]).sum(0).view_as(x)),
        ((4, 2, 2),),
    ),
    "baddbmm": Kind(
        lambda p, x: total(torch.baddbmm(p[0], x, p[1].expand(len(x), 2, 2))), ((1, B, 1), (2, 2))
    ),
    "baddbmm of all": Kind(
        lambda p, x: total(torch.baddbmm(p[0].expand(len(x), B, 2), x, p[1].expand(len(x), 2, 2))),
        ((2,), (2, 2)),
    ),
    "baddbmm of heads": Kind(
        lambda p, x: total(
            torch.baddbmm(torch.ones(2, dtype=x.dtype), x.transpose(0, 1), p[0]).transpose(0, 1)
        ),
        ((B, 2, 2),),
    ),
}
BATCHES = {f"batches: {name}": kind._replace(batch=(SEQUENCE,)) for name, kind in BATCHES.items()}
KINDS: dict[str, Kind] = {
    **BATCHES,
    "a token written by index": Kind(written_token, ((), (2, 2))),
    "a slice written by index": Kind(written_slice, ((1,),)),
    "a weight written by index": Kind(written_weight, ((2, 2),)),
    "a weight masked in place": Kind(masked_in_place, ((2, 2),)),
    "a weight overwritten after its use": Kind(written_after_its_use, ((2, 2),)),
    "written by index_put": Kind(scattered, ((2,),)),
    **{
        name: Kind(
            lambda p, x, use=use, write=write: total(write(use(p, x))), ((2, 2),), (rand(B, 2, 2),)
        )
        for name, (use, write) in OVERWRITTEN.items()
    },
    "frozen by no_grad": Kind(frozen, ((2, 2),)),
    "a target network": Kind(target_network, ((2, 2),)),
    "detached": Kind(detached, ((2, 2),)),
    "straight-through": Kind(straight_through, ((2, 2),)),
    "no_grad and enable_grad": Kind(partly_enabled, ((2, 2),)),
    "a hook on a weight": Kind(hooked_weight, ((2, 2),)),
    "a hook after the use": Kind(hooked_after_its_use, ((2, 2),)),
    "a hook on an output": Kind(hooked_output, ((2, 2), (2, 2))),
    "own function of weights": Kind(own_function_of_weights, ((2, 2),)),
    "own function of features": Kind(own_function_of_features, ((2, 2), (2, 2))),
    **{
        f"axes: {name}": Kind(over(*pair), ((2, 2),), warns=name in MIXED)
        for name, pair in AXES.items()
    },
    "expand by name": Kind(lambda p, x: (p[0].expand(size=(B, 2)) * x).sum(1).sin(), ((2,),)),
    "vector @ batch": Kind(lambda p, x: (p[0] @ x.T).sin(), ((2,),)),
    "batch @ vector": Kind(lambda p, x: (x @ p[0]).sin(), ((2,),)),
    "linear with a vector": Kind(lambda p, x: F.linear(x, p[0]).sin(), ((2,),)),
    "sequence @ vector": Kind(lambda p, x: total(x @ p[0]), ((2,),), (SEQUENCE,)),
    "vector @ sequence": Kind(lambda p, x: total(p[0] @ x), ((B,),), (SEQUENCE,)),
    "batch @ matrices": Kind(lambda p, x: total(x[:, None, None] @ p[0]), ((2, 2, 1),)),
    "matrices @ batch": Kind(lambda p, x: total(p[0] @ x), ((2, 2, 2),), (rand(B, 2, 2, 3),)),
    "matrix @ columns": Kind(lambda p, x: (p[0] @ x.T).sin().sum(0), ((2, 2),)),
    "examples assembled in a list": Kind(assembled, ((3, 3), (3, 3)), (rand(B, B),)),
    "parameters by masked_scatter": Kind(merged_by_position, ((B, 2),)),
    "the last token": Kind(last_token, ((2, 2), (2, 2)), (SEQUENCE,)),
    "messages on a graph": Kind(added_to_nodes, ((2, 2), (2, 2)), (SEQUENCE,)),
    "experts": Kind(experts, ((2, 2, 2), (2, 2)), (SEQUENCE,)),
    "positions without examples": Kind(positions, ((2, 2), (5, 2)), (SEQUENCE,)),
    "a padding mask": Kind(padded, ((2, 2), (2, 2)), (SEQUENCE, MASK)),
    "cdist": Kind(lambda p, x: torch.cdist(x, p[0]).sum(1), ((2, 2),)),
    "cdist of sequences": Kind(lambda p, x: total(torch.cdist(x, p[0])), ((4, 2),), (SEQUENCE,)),
    "an inner gradient": Kind(
        lambda p, x: total(grad(lambda z: F.linear(z, p[0]).sin().sum())(x)), ((2, 2),)
    ),
    "an inner jvp": Kind(
        lambda p, x: total(jvp(lambda z: F.linear(z, p[0]).sin(), (x,), (x.cos(),))[1]), ((2, 2),)
    ),
    "prelu of what an inner map returns": Kind(
        lambda p, x: total(F.prelu(vmap(torch.cos)(x * p[1]), p[0])), ((1,), (2,))
    ),
    "a shape, then a transpose": Kind(
        lambda p, x: total(F.linear(x, p[0].T if p[0].shape[0] else p[0])), ((2, 3),)
    ),
    "tied by transposition": Kind(
        lambda p, x: total(F.linear(F.linear(x, p[0]).tanh(), p[0].T)), ((3, 2),)
    ),
    "tied embedding and head": Kind(
        lambda p, i: total(F.linear(F.embedding(i, p[0]).tanh(), p[0])),
        ((5, 2),),
        (torch.tensor([[0, 1], [2, 2], [4, 0]]),),
    ),
    "addmm": Kind(lambda p, x: total(torch.addmm(p[0], x, p[1])), ((3,), (2, 3))),
    "baddbmm": Kind(
        lambda p, x: total(torch.baddbmm(p[0], x, p[1].expand(B, 2, 2))),
        ((1, 1, 2), (2, 2)),
        (SEQUENCE,),
    ),
    "tensordot": Kind(lambda p, x: total(torch.tensordot(x, p[0], 1)), ((2, 3),), (SEQUENCE,)),
    "einsum with an ellipsis": Kind(
        lambda p, x: total(torch.einsum("...i,ji->...j", x, p[0])), ((3, 2),), (SEQUENCE,)
    ),
    "no dependence": Kind(lambda p, x: x.sum(1) + 0 * p[0].sum(), ((2, 2),)),
    "losses that mix examples": Kind(
        lambda p, x: F.linear(x, p[0]).cumsum(0).sin().sum(1), ((2, 2),), warns=True
    ),
}


def check(objective: Any, fn: Callable[..., Tensor], params: Any, *args: Any) -> None:
    """Compare Gramian, pullback and rows with plain loops."""
    rows = by_loops(fn, params, *args)
    weights = torch.linspace(-1, 1.5, len(rows), dtype=rows.dtype)
    _, gramian, vjp_fn = jd.gramian_vjp(objective, params, *args)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)
    flat = torch.cat([leaf.flatten() for leaf in vjp_fn(weights)])
    torch.testing.assert_close(flat, weights @ rows, rtol=1e-9, atol=1e-11)
    jac = torch.cat([leaf.reshape(len(rows), -1) for leaf in jd.jac(objective)(params, *args)], 1)
    torch.testing.assert_close(jac, rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_right_and_warns_once_where_examples_are_mixed(name: str) -> None:
    kind = KINDS[name]
    params = [rand(*shape, seed=1) for shape in kind.shapes]
    objective = jd.instancewise(kind.fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            check(objective, kind.fn, params, *kind.batch)
    proofs = [w for w in caught if "is not the sum over uses" in str(w.message)]
    assert len(proofs) == kind.warns


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_matrices_have_forms_with_and_without_examples(name: str) -> None:
    kind = BATCHES[name]
    params = [rand(*shape, seed=1) for shape in kind.shapes]
    explained = str(jd.explain_gramian(jd.instancewise(kind.fn), params, *kind.batch))
    assert "no rule" not in explained
    assert "backward" not in explained

    def one(p: Any, x: Tensor) -> Tensor:
        return kind.fn(p, x.unsqueeze(0)).squeeze(0)

    rows = by_loops(kind.fn, params, *kind.batch)
    for fn, route in ((kind.fn, "layerwise"), (jd.per_example(one), "auto")):
        found = jd.gramian(fn, route=route)(params, *kind.batch)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["frozen by no_grad", "a padding mask", "tied by transposition"])
def test_losses_without_examples_are_right_too(name: str) -> None:
    kind = KINDS[name]
    params = [rand(*shape, seed=1) for shape in kind.shapes]
    rows = by_loops(kind.fn, params, *kind.batch)
    found = jd.gramian(kind.fn, route="layerwise")(params, *kind.batch)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-11)


# Python state


def test_decides_anew_in_each_run() -> None:
    params = [rand(2, 2, seed=k) for k in range(3)]
    flags = {"layer": 0, "swap": False, "name": "tanh"}

    def losses(p: Any, x: Tensor) -> Tensor:
        x = x.T.contiguous().T if flags["swap"] else x
        h = F.linear(x, p[flags["layer"]])
        return total(getattr(torch, flags["name"])(h))

    objective, x = jd.instancewise(losses), rand(2, 2)
    for change in ({"layer": 1}, {"swap": True}, {"name": "sin"}, {"layer": 2}, {"layer": 0}):
        flags |= change
        check(objective, losses, params, x)


def test_routes_by_data_and_by_arguments() -> None:
    params = [rand(2, 2, 2, seed=k) for k in range(2)]

    def losses(p: Any, x: Tensor, i: int, k: int) -> Tensor:
        chosen = p[k][i] if bool(x[0, 0] > 0) else p[1 - k][i].T
        return total(x @ chosen)

    objective = jd.instancewise(losses, in_dims=(None, 0, None, None))
    for x in (rand(2, 2), -rand(2, 2)):
        for i in (0, 1):
            for k in (0, 1, 0):
                check(objective, losses, params, x, i, k)


def test_the_same_shapes_in_other_roles_are_another_plan() -> None:
    constant, order = rand(B, B, seed=5), [False]

    def losses(p: Any, x: Tensor) -> Tensor:
        a, b = (constant, x) if order[0] else (x, constant)
        return total(F.linear(a.T if order[0] else a, p[0]) * b)

    objective = jd.instancewise(losses)
    for flag in (False, True, False):
        order[0] = flag
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(objective, losses, [rand(B, B, seed=2)], rand(B, B))


def test_layers_dropped_at_random_are_planned_again() -> None:
    params = [rand(2, 2, seed=k) for k in range(3)]

    def losses(p: Any, x: Tensor, seed: int) -> Tensor:
        rng = random.Random(seed)
        for k, w in enumerate(p):
            x = F.linear(x, w).tanh() if k == 0 or rng.random() < 0.5 else x
        return total(x)

    objective = jd.instancewise(losses, in_dims=(None, 0, None))
    for seed in (1, 2, 3, 1, 5):
        check(objective, losses, params, rand(B, 2), seed)


def test_operations_of_the_same_names_within_a_transform_are_another_plan() -> None:
    inner, constant = [False], rand(2, 2, seed=3)

    def losses(p: Any, x: Tensor) -> Tensor:
        if inner[0]:
            return total(grad(lambda z: (z @ p[0]).sin().sum())(x))
        return total(F.linear(x, constant @ p[0]))

    objective = jd.instancewise(losses)
    for flag in (False, True, False):
        inner[0] = flag
        check(objective, losses, [rand(2, 2, seed=2)], rand(B, 2))


def test_objectives_that_never_run_the_same_way_are_right() -> None:
    params, calls = [rand(2, 2)], [0]

    def losses(p: Any, x: Tensor) -> Tensor:
        calls[0] += 1
        for _ in range(calls[0] % 7):
            x = x.clone()
        return total(F.linear(x, p[0]))

    objective = jd.instancewise(losses)
    for _ in range(3):
        check(objective, losses, params, rand(B, 2))


# Random numbers


@pytest.mark.parametrize("draw", ["dropout", "weight", "gumbel", "normal_", "rsample"])
def test_planning_draws_no_numbers(draw: str) -> None:
    def losses(p: Any, x: Tensor) -> Tensor:
        h = F.linear(x, F.dropout(p[0], 0.5) if draw == "weight" else p[0])
        if draw == "dropout":
            h = F.dropout(h, 0.5)
        elif draw == "gumbel":
            h = F.gumbel_softmax(h)
        elif draw == "normal_":
            h = h + torch.empty_like(h).normal_()
        elif draw == "rsample":
            h = h + torch.distributions.Normal(h, torch.ones_like(h), validate_args=False).rsample()
        return total(h)

    objective, params, x = jd.instancewise(losses), [rand(2, 2)], rand(B, 2)
    found = []
    for _ in range(2):  # the first plans
        torch.manual_seed(3)
        found.append((jd.gramian(objective)(params, x), torch.rand(())))
    torch.manual_seed(3)
    rows = by_loops(losses, params, x)
    for gramian, after in found:
        torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)
        assert after == found[0][1]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=0.5)


DROPPED: dict[str, Callable[..., Tensor]] = {  # operations that draw, on parameters themselves
    "queries": lambda p, x: attend(p[0], x, x),
    "keys and values": lambda p, x: attend(x, p[0], p[1]),
    "a bias": lambda p, x: attend(x, x, x, p[1]),
}


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("layout", ["shared", "batched", "per example"])
def test_what_draws_numbers_is_not_run_again(name: str, layout: str) -> None:
    fn = DROPPED[name]

    def whole(p: Any, x: Tensor) -> Tensor:
        q = [w.expand(len(x), -1, -1) for w in p]
        h = fn(q if layout == "batched" else p, x)
        return total(h).sum() if layout == "per example" else total(h)

    objective: Any = {
        "shared": whole,
        "batched": jd.instancewise(whole),
        "per example": jd.per_example(whole, randomness="different"),
    }[layout]
    params, x = [rand(1, 4, 4), rand(1, 4, 4, seed=1)], rand(B, 4, 4)
    x = x.unsqueeze(1) if layout == "per example" else x
    found = []
    for route in ("jacobian", "layerwise"):
        torch.manual_seed(3)
        _, gramian, vjp_fn = jd.gramian_vjp(objective, params, x, route=route)
        found.append((gramian, vjp_fn(torch.arange(1.0, B + 1).double())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


# Batch statistics


def test_evaluation_and_training_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    net[1].register_buffer("running_mean", torch.zeros(3, dtype=torch.float64))
    net[1].register_buffer("running_var", torch.ones(3, dtype=torch.float64))
    params = {name: value.detach() for name, value in net.named_parameters()}
    objective = jd.instancewise(lambda p, x: functional_call(net, p, (x,)).square().sum(1))
    jd.gramian(objective)(params, rand(5, 2)) if net.eval() else None
    for name in ("running_mean", "running_var"):
        setattr(net[1], name, None)
    net.train()
    with pytest.raises(ValueError, match="batch normalisation in training mode"):
        jd.gramian(objective)(params, rand(5, 2))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_statistics_of_each_example_by_itself(norm: str) -> None:
    def loss(p: Any, x: Tensor) -> Tensor:
        if norm == "batch":
            return F.batch_norm(x[None], None, None, p[0], p[1], True).sin().sum()
        return F.instance_norm(x[None], None, None, p[0], p[1]).sin().sum()

    params, x = [rand(3), rand(3, seed=1)], rand(B, 3, 5)

    def whole(p, x):
        return torch.stack([loss(p, row) for row in x])

    check(jd.per_example(loss), whole, params, x)


def test_instance_norm_that_tracks_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, True, True, True)).double().train()
    apply, params, buffers = jd.functionalize(net)

    def losses(p: Any, x: Tensor) -> Tensor:
        return total(apply(dict(zip(params, p, strict=True)), buffers, x)[0])

    check(jd.instancewise(losses), losses, list(params.values()), rand(B, 2, 4, 4))


# Claims and options


def test_in_dims_names_the_examples() -> None:
    def losses(p: Any, c: Tensor, x: Tensor) -> Tensor:
        return total((F.linear(x.T, p[0]) + c).tanh())

    objective = jd.instancewise(losses, in_dims=(None, None, 1))
    args = rand(2), rand(2, 2, seed=3)
    check(objective, losses, [rand(2, 2, seed=1)], *args)
    line = jd.explain_gramian(objective, [rand(2, 2, seed=1)], *args).leaves[0]
    assert line.rule == "linear"


def test_a_batch_that_cannot_grow_costs_rows_and_says_so() -> None:
    labels = rand(B, 2)
    objective = jd.instancewise(lambda p, x: total(F.linear(x, p[0]) - labels))
    line = jd.explain_gramian(objective, [rand(2, 2)], rand(B, 2)).leaves[0]
    assert line.contraction == "m backward passes"
    assert "no other batch" in line.rule


def test_one_example_alone() -> None:
    def fn(p, x):
        return total(F.linear(x, p[0]))

    check(jd.instancewise(fn), fn, [rand(2, 2)], rand(1, 2))


def test_mixed_examples_warn_unless_unchecked() -> None:
    def mixed(p, x):
        return F.linear(x, p[0]).softmax(0).sum(1)

    with pytest.warns(UserWarning, match=r"'0' \(linear\).*jd.check_instancewise"):
        check(jd.instancewise(mixed), mixed, [rand(2, 2)], rand(B, 2))
    jd.gramian(jd.instancewise(mixed, check=False))([rand(2, 2)], rand(B, 2))


def test_zero_factors_of_an_update_of_low_rank_are_proven() -> None:
    frozen = rand(3, 2)

    def mixed(p: Any, x: Tensor) -> Tensor:
        h = F.linear(x, frozen + p[0] @ p[1])
        return total(h - h.mean(0))

    params = [torch.zeros(3, 1, dtype=torch.float64), rand(1, 2)]
    with pytest.warns(UserWarning, match=r"'0' \(linear\), '1' \(linear\)"):
        check(jd.instancewise(mixed), mixed, params, rand(B, 2))


def test_modules_keep_nothing_of_planning() -> None:
    class Rotary(nn.Module):
        cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None or self.cache.shape[0] < x.shape[1]:
                self.cache = torch.arange(x.shape[1], dtype=x.dtype).cos().unsqueeze(1)
            return x * self.cache[: x.shape[1]]

    rotary = Rotary()

    def fn(p, x):
        return total(F.linear(rotary(x), p[0]))

    check(jd.instancewise(fn), fn, [rand(2, 2)], SEQUENCE)
    assert type(rotary.cache) is Tensor
    assert not rotary.cache.requires_grad


@pytest.mark.parametrize("terms", [2, 6])
@pytest.mark.parametrize("size", [64, 256])
def test_differences_of_near_values_in_single_precision(size: int, terms: int) -> None:
    torch.manual_seed(0)
    params = [torch.randn(size, 4) / 2, torch.randn(size), torch.randn(1, size) / size**0.5]

    def losses(p: Any, s: Tensor, t: Tensor) -> Tensor:
        def value(x):
            return F.linear(torch.tanh(F.linear(x, p[0], p[1])), p[2]).squeeze(-1)

        return sum(((-1) ** k * value(s + k * (t - s)) for k in range(terms)), torch.zeros(()))

    s = torch.randn(8, 4)
    t = s + 1e-3 * torch.randn(8, 4)
    rows = by_loops(losses, [p.double() for p in params], s.double(), t.double())
    exact = rows @ rows.T
    found = jd.gramian(jd.instancewise(losses))(params, s, t)
    assert (found.double() - exact).norm() <= 1e-3 * exact.norm()
    assert bool((found.diagonal() > 0).all())
