"""Programs at random: whatever an objective does, Gramians and pullbacks are those of plain loops.

    python -m tests.programs --n 2000 --seed 0 [--compiled --first nothing] [--float32 --device D]

A program nests operations that move, merge, split, gather and write axes around uses of parameters.
It runs three times, the second time with another Python state. Prints what is wrong or raises.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import torchjd_func as jd

Body = Callable[[Tensor], Tensor]
LAYOUTS = ("batched", "per example", "shared")


class Doubled(torch.autograd.Function):
    """An identity whose gradient is twice as large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


# Ways to move axes: `(h, body) -> body's result, moved back`; the last axis is the features'


def _swapped(h: Tensor, body: Body) -> Tensor:
    return body(h.transpose(0, 1)).transpose(0, 1)


def _swapped_by_name(h: Tensor, body: Body) -> Tensor:
    return torch.transpose(input=body(torch.transpose(input=h, dim0=1, dim1=0)), dim0=0, dim1=1)


def _permuted(h: Tensor, body: Body) -> Tensor:
    dims = (1, 0, *range(2, h.ndim))
    return torch.permute(input=body(h.permute(*dims)), dims=dims)


def _moved(h: Tensor, body: Body) -> Tensor:
    return torch.movedim(body(torch.movedim(h, source=0, destination=1)), 1, 0)


def _flattened(h: Tensor, body: Body) -> Tensor:
    return body(h.flatten(0, 1)).unflatten(0, h.shape[:2])


def _flattened_last_first(h: Tensor, body: Body) -> Tensor:
    g = h.transpose(0, 1)
    return body(g.reshape(-1, *h.shape[2:])).view(*g.shape).transpose(0, 1)


def _repeated(h: Tensor, body: Body) -> Tensor:
    out = body(h.repeat(2, *[1] * (h.ndim - 1)))
    return out.view(2, *h.shape).square().sum(0)


def _stacked(h: Tensor, body: Body) -> Tensor:
    first, second = body(torch.vstack([h, 2 * h])).chunk(2)
    return first * second


def _joined(h: Tensor, body: Body) -> Tensor:
    return body(torch.cat((h, h.cos()), dim=0))[h.shape[0] :] + h


def _padded(h: Tensor, body: Body) -> Tensor:
    return body(F.pad(h, (0, 0) * (h.ndim - 1) + (1, 2)))[1 : 1 + h.shape[0]]


def _scattered(h: Tensor, body: Body) -> Tensor:
    place = torch.arange(h.shape[0], device=h.device).flip(0)
    return body(torch.zeros_like(h).index_add(0, place, h))[place]


def _copied(h: Tensor, body: Body) -> Tensor:
    place = torch.arange(h.shape[0], device=h.device).flip(0)
    return body(torch.zeros_like(h).index_copy(0, place, h)).flip(0)


def _flipped(h: Tensor, body: Body) -> Tensor:
    return body(h.flipud()).flip([0])


def _mapped(h: Tensor, body: Body) -> Tensor:
    return torch.vmap(body)(h)


def _mapped_second(h: Tensor, body: Body) -> Tensor:
    return torch.vmap(body, in_dims=1, out_dims=1)(h)


def _listed(h: Tensor, body: Body) -> Tensor:
    return torch.stack([body(row) for row in h.unbind()])


def _listed_second(h: Tensor, body: Body) -> Tensor:
    return torch.stack([body(h[i]) for i in range(len(h))], 1).transpose(0, 1)


def _written(h: Tensor, body: Body) -> Tensor:
    g = torch.zeros_like(h)
    g[:, 0] = h[:, 0]
    g[:, 1:] = 2 * h[:, 1:]
    return body(g)


def _expanded(h: Tensor, body: Body) -> Tensor:
    return body(h.unsqueeze(1).expand(-1, 2, *h.shape[1:])).square().sum(1)


def _inserted(h: Tensor, body: Body) -> Tensor:
    return body(h[None])[0]


def _differentiated(h: Tensor, body: Body) -> Tensor:
    return torch.func.grad(lambda g: body(g).sin().sum())(h)


def _pushed(h: Tensor, body: Body) -> Tensor:
    return torch.func.jvp(body, (h,), (h.cos(),))[1]


def _rolled(h: Tensor, body: Body) -> Tensor:
    return body(h.roll(1, -2)) if h.ndim > 2 else body(h)


def _gathered(h: Tensor, body: Body) -> Tensor:
    index = torch.zeros_like(h, dtype=torch.long)
    return body(h.gather(-1, index) + h)


def _masked(h: Tensor, body: Body) -> Tensor:
    return body(h.masked_fill(h > 1, 0.5)).where(h < 2, h)


def _overwritten(h: Tensor, body: Body) -> Tensor:
    return F.relu(body(h).add_(0.1), inplace=True)


def _by_function(h: Tensor, body: Body) -> Tensor:
    return Doubled.apply(body(h))


def _hooked(h: Tensor, body: Body) -> Tensor:
    out = body(h)
    if out.requires_grad:
        out.register_hook(lambda grad: -grad)
    return out * 1


def _split(h: Tensor, body: Body) -> Tensor:
    parts = body(h).split(1, dim=-1)
    return torch.cat(parts[::-1], -1)


ANYWHERE = (_inserted, _gathered, _masked, _by_function, _split, _differentiated, _pushed)
MOVES = (
    *(_swapped, _swapped_by_name, _permuted, _moved, _flattened, _flattened_last_first),
    *(_repeated, _stacked, _joined, _padded, _scattered, _copied, _flipped, _mapped),
    *(_mapped_second, _listed, _listed_second, _expanded, _rolled, *ANYWHERE),
)
PLAIN_ONLY = (_written, _overwritten, _hooked)  # not under another transform


# Uses of parameters: `(h, draw) -> h`, where `draw(*shape)` returns a parameter


def _weight(rng: Choices, draw: Callable[..., Tensor], d: int) -> Tensor:
    """Return a (d, d) matrix made of parameters."""
    w = draw(d, d)
    ways: list[Callable[[], Tensor]] = [
        lambda: w,
        lambda: w,
        lambda: w.T,
        lambda: w.t().contiguous(),
        lambda: w * w.new_ones(d, d).tril(),
        lambda: w / w.norm(),
        lambda: w + draw(d, 1) @ draw(1, d),
        lambda: w * w.detach().abs().sum(),
        lambda: w + (w.round() - w).detach(),
        lambda: _no_grad(w),
        lambda: _overwrite(w),
        lambda: draw(2, d, d)[1],
        lambda: draw(2 * d, d).chunk(2)[0],
        lambda: torch.stack([draw(d), draw(d)])[[0, 1] * d][:d],
        lambda: Doubled.apply(w),
        lambda: (1 - w) ** 2,
        lambda: w.to(w.dtype).clone(),
        lambda: torch.where(w > 0, w, 2 * w),
        lambda: w.softmax(0),
        lambda: w.new_zeros(d, d).index_add(0, torch.arange(d, device=w.device), w),
        lambda: F.dropout(w, 0.3),
        lambda: WEIGHT_NORM(w, draw(d, 1), 0),
    ]
    return rng.choice(ways)()


def _no_grad(w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w.square().sum()
    return w * scale


def _overwrite(w: Tensor) -> Tensor:
    w = w.clone()
    w[0, 0] = 0.3
    return w


def _use(rng: Choices, h: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Use parameters on the last axis."""
    d = h.shape[-1]

    def v():
        return draw(d)

    letters = "abcefghk"[: h.ndim - 1]

    def w():
        return _weight(rng, draw, d)

    ways: list[Callable[[], Tensor]] = [
        lambda: F.linear(h, w()),
        lambda: F.linear(h, w(), v()),
        lambda: h @ w(),
        lambda: torch.matmul(input=h, other=w()),
        lambda: (w() @ h.mT).mT if h.ndim > 1 else w() @ h,
        lambda: w() @ h[..., None] if h.ndim > 1 else h,
        lambda: h * v() + draw(()),
        lambda: 2 ** v() - h / (1 + v() ** 2),
        lambda: h + F.linear(h, v()).unsqueeze(-1),
        lambda: h + (h @ v()).unsqueeze(-1),
        lambda: (h.unsqueeze(-2) @ draw(2, d, d)[:1]).squeeze(-2),
        lambda: (h[..., None, None, :] @ draw(2, d, d)).sum((-3, -2)),
        lambda: torch.einsum(f"{letters}i,ij->{letters}j", h, w()),
        lambda: torch.einsum("...i,ij->...j", h, w()),
        lambda: torch.tensordot(h, w(), dims=1),
        lambda: torch.addmm(v(), h.reshape(-1, d), w()).reshape(h.shape),
        lambda: torch.addmm(v(), w(), h.reshape(-1, d).T).T.reshape(h.shape),
        lambda: F.layer_norm(h, (d,), v(), v()),
        lambda: F.rms_norm(h, (d,), v()),
        lambda: _instances(h, v(), v()),
        lambda: (
            F.conv1d(h.reshape(-1, 1, d), draw(2, 1, 3), draw(2), padding=1).sum(1).reshape(h.shape)
        ),
        lambda: F.prelu(h + 1e-3, draw(1)),  # at 0 derivatives of torch differ (2.13)
        lambda: torch.where(h > 0, h * v(), h),
        lambda: torch.lerp(h, v(), 0.3),
        lambda: torch.addcmul(h, v(), h.cos()),
        lambda: h + draw(5)[torch.arange(d, device=h.device) % 5],
        lambda: h + F.embedding(torch.arange(d, device=h.device) % 4, draw(4, 1)).squeeze(-1),
        lambda: F.embedding((h > 0).long(), draw(2, 3)).sum(-1) + h,
        lambda: torch.cdist(h.reshape(-1, d), draw(d, d)).reshape(h.shape),
        lambda: torch.cat([h, v().expand(*h.shape[:-1], d)], -1)[..., d // 2 : d // 2 + d],
        lambda: h + v().expand(h.shape).cos(),
        lambda: F.bilinear(h, h.cos(), draw(d, d, d), v()),
        lambda: F.linear(F.linear(h, (first := draw(d, d))).tanh(), first.T),
        lambda: F.linear(h, (first := draw(d, d))) + 0.1 * F.linear(h.cos(), first),
        lambda: h * F.normalize(v(), dim=0),
        lambda: h + v().exp().sum(),
        lambda: F.linear(Doubled.apply(h), w()),
        lambda: h - draw(1, d) * draw(d, 1)[0],
        lambda: h.cos().mul_(v()).sub_(draw(())),
        lambda: _added_in_place(h, v(), draw(4, 1)),
    ]
    out = rng.choice(ways)()
    return out if out.shape == h.shape else out.squeeze(-1)


def _added_in_place(h: Tensor, first: Tensor, table: Tensor) -> Tensor:
    """Add to parts of a tensor, too."""
    g = h.cos()
    g += table[torch.arange(h.shape[-1], device=h.device) % 4, 0]
    g[..., 1:] += first[1:]
    g.addcdiv_(first, 2 + h.cos())
    return g


def _instances(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise three numbers made of each entry."""
    each = torch.stack([h, h.cos(), h.square()], -1).reshape(-1, h.shape[-1], 3)
    return F.instance_norm(each, weight=weight, bias=bias)[..., 0].reshape(h.shape)


class Choices:
    """Random choices that are noted, and made again where a compiler can follow."""

    def __init__(self, seed: float, noted: list[int] | None = None) -> None:
        self.rng = random.Random(seed) if noted is None else None
        self.noted: list[int] = [] if noted is None else noted
        self.place = 0

    def choice(self, options: Any) -> Any:
        """Return one of the options."""
        if self.rng is not None:
            self.noted.append(self.rng.randrange(len(options)))
        self.place += 1
        return options[self.noted[self.place - 1]]


@dataclass
class Program:
    """A random objective of `(params, x, flag)`."""

    seed: int
    layout: str
    dtype: torch.dtype = torch.float64
    names: list[str] = field(default_factory=list)
    noted: list[list[int]] = field(default_factory=lambda: [[], []])

    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of examples, positions and features."""
        rng = random.Random(self.seed)
        return rng.choice((2, 3, 4)), rng.choice((2, 3, 4)), rng.choice((2, 3, 4))

    def run(self, draw: Callable[..., Tensor], x: Tensor, flag: int) -> Tensor:
        """Return features of `(b, t, d)`, or of `(t, d)`, by the parameters that are drawn."""
        if torch.compiler.is_compiling():
            rng = Choices(self.seed, self.noted[flag % 2])
        else:
            torch.manual_seed(self.seed)
            rng = Choices(self.seed)
            self.noted[flag % 2] = rng.noted
            self.names = []
        plain = self.layout == "batched"
        h = x
        for _ in range(rng.choice((1, 2, 2))):
            h = self.block(rng, h, draw, rng.choice((0, 1, 1, 2)), plain, flag)
        return h

    def block(
        self, rng: Choices, h: Tensor, draw: Any, nesting: int, plain: bool, flag: int
    ) -> Tensor:
        """Nest moves around a use."""
        if not nesting:
            rng.choice(range(1 + 2 * (flag % 2)))
            return torch.tanh(_use(rng, h, draw))
        moves = MOVES if h.ndim > 2 else ANYWHERE
        move = rng.choice((*moves, *PLAIN_ONLY) if plain and h.ndim > 2 else moves)
        if not torch.compiler.is_compiling():
            self.names.append(move.__name__)
        inner = plain and move not in (_mapped, _mapped_second, _differentiated, _pushed)
        made: list[Tensor] = []
        start = rng.place
        calls = [0]

        def body(g: Tensor) -> Tensor:
            if not calls[0]:
                calls[0] = 1

                def first(*shape: Any) -> Tensor:
                    made.append(draw(*shape))
                    return made[-1]

                return self.block(rng, g, first, nesting - 1, inner, flag)
            place = [0]

            def again(*shape: Any) -> Tensor:
                place[0] += 1
                return made[place[0] - 1]

            same = Choices(0, rng.noted)
            same.place = start
            return self.block(same, g, again, nesting - 1, inner, flag)

        return move(h, body)


def parameters(program: Program, x: Tensor) -> list[Tensor]:
    """Return the parameters that all states of a program use."""
    found: list[Tensor] = []
    for flag in (0, 1):
        rng, count = random.Random(program.seed), iter(range(10**6))

        def draw(*shape: Any, numbers: random.Random = rng, place: Iterator[int] = count) -> Tensor:
            size = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
            values = [numbers.gauss(0, 1) for _ in range(math.prod(size))]
            made = torch.tensor(values, dtype=x.dtype, device=x.device).reshape(size)
            made = torch.func.debug_unwrap(made, recurse=True)  # of a transform in the program
            number = next(place)
            if number == len(found):
                found.append(made)
            elif found[number].shape != made.shape:
                found.append(made)  # of another state; never reached by its number
                return made
            return found[number]

        program.run(draw, x if program.layout == "batched" else x[0], flag)
    return found


def objective(program: Program) -> Callable[..., Tensor]:
    """Return the losses `(b,)` of a program, or three, or the loss of an example."""

    def drawing(params: list[Tensor]) -> Callable[..., Tensor]:
        left = list(params)

        def draw(*shape: Any) -> Tensor:
            size = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
            for place, p in enumerate(left):
                if tuple(p.shape) == tuple(size):
                    return left.pop(place)
            raise AssertionError(size)

        return draw

    def losses(params: list[Tensor], x: Tensor, flag: int) -> Tensor:
        out = program.run(drawing(params), x, flag)
        if program.layout == "batched":
            return out.sin().flatten(1).sum(1)
        return out.sin().sum() if program.layout == "per example" else out.sin().sum(0)

    return losses


class ByFormulas(TorchFunctionMode):
    """Computes norms by their formulas: of kernels torch forgets derivatives (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        run = _FORMULAS.get(func)
        return (func if run is None else run)(*args, **(kwargs or {}))


def _standardised(x: Tensor) -> Tensor:
    """Return numbers of mean 0 and variance 1 along the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _layer_norm(x: Tensor, shape: Any, *, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    return _standardised(x) * weight + bias


def _instance_norm(x: Tensor, *, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    return _standardised(x) * weight[:, None] + bias[:, None]


def _weight_norm(v: Tensor, g: Tensor, _: int) -> Tensor:
    return v * (g / v.norm(dim=1, keepdim=True))


WEIGHT_NORM: Callable[..., Tensor] = vars(torch)["_weight_norm"]
_FORMULAS: dict[Any, Callable[..., Tensor]] = {  # as modes are handed these: options by name
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    WEIGHT_NORM: _weight_norm,
}


def by_formulas(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function whose norms are computed by formulas."""

    def run(*args: Any) -> Tensor:
        with ByFormulas():
            return fn(*args)

    return run


def by_loops(fn: Callable[..., Tensor], params: list[Tensor], *args: Any) -> Tensor:
    """Return the rows by one plain backward pass for each loss."""
    leaves = [p.detach().clone().requires_grad_() for p in params]
    rows = []
    for loss in fn(leaves, *args):
        if loss.requires_grad:
            options: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
            rows.append(torch.autograd.grad(loss, leaves, **options))
        else:
            rows.append([torch.zeros_like(leaf) for leaf in leaves])
    return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])


def outcome(
    seed: int,
    *,
    compiled: bool = False,
    dtype: torch.dtype = torch.float64,
    first: str = "call",
    device: str = "cpu",
) -> str:
    """Run one program: `"right"`, `"warned"` (and right), `"invalid"`, or what is wrong.

    Before it is compiled, a `"call"`, or `"init_state"`, plans the engine, or `"nothing"` does.
    """
    layout = LAYOUTS[(0, 0, 0, 1, 2)[seed % 5]]
    program = Program(seed, layout, dtype)
    b, t, d = program.sizes()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, d, generator=generator, dtype=torch.float64).to(device, dtype)
    fn = objective(program)
    if layout == "shared":
        given, whole, made = x[0], fn, fn
    elif layout == "batched":
        given, whole, made = x, fn, jd.instancewise(fn)
    else:
        given, made = x, jd.per_example(fn, in_dims=(None, 0, None))

        def whole(params, x, flag):
            return torch.stack([fn(params, row, flag) for row in x])

    whole = by_formulas(whole)
    try:
        params = parameters(program, x)
        expected = [by_loops(whole, params, given, flag) for flag in (0, 1)]
        if layout != "batched":
            for flag in (0, 1):
                jd.gramian(made, route="jacobian")(params, given, flag)
    except Exception:
        return "invalid"
    if not compiled:
        result = _compared(_step(made), params, given, expected, dtype)
        twice = seed % 4 == 0 and dtype is torch.float64 and "_hooked" not in program.names
        if twice and result == "right":
            result = _second(made, whole, params, given)
        rounded = result.startswith("wrong") and is_rounding(whole, params, given, expected)
        return "invalid" if rounded else result
    for flag in (0, 1):
        if first == "call":
            _step(made)(params, given, flag, expected[0].new_zeros(len(expected[0])))
        elif first == "init_state":
            jd.init_state(jd.upgrad(), made, params, given, flag)
    try:
        result = _compared(_compiled(made), params, given, expected, dtype)
    except Exception:
        result = "raised"
    if result in ("right", "warned"):
        return result
    # What torch compiles to something else, such as random draws, it does by all routes alike
    try:
        expected = [_drawn(_compiled(made, "jacobian"), params, given, flag) for flag in (0, 1)]
    except Exception:
        return "invalid"
    found = [_drawn(_compiled(made), params, given, flag) for flag in (0, 1)]
    close = [
        torch.allclose(a, b, rtol=1e-7, atol=1e-9 * float(b.norm()))
        for pair in zip(found, expected, strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    return "invalid" if all(close) else result


def _second(
    made: Callable[..., Any], fn: Callable[..., Tensor], params: list[Tensor], x: Tensor
) -> str:
    """Hold the derivative of a Gramian against that of the length of a gradient.

    Hooks are none of what torch.func differentiates, and many operations have no such derivative.
    """
    leaves = [p.detach().clone().requires_grad_() for p in params]
    options: Any = {"allow_unused": True, "materialize_grads": True}
    try:
        with ByFormulas():
            losses = fn(leaves, x, 0)
        weights = torch.linspace(-1, 1.5, len(losses), dtype=x.dtype, device=x.device)
        grads = torch.autograd.grad(losses @ weights, leaves, create_graph=True, **options)
        length = torch.stack([grad.square().sum() for grad in grads]).sum()
        expected = torch.autograd.grad(length, leaves, **options)
    except RuntimeError:
        return "right"

    def read(params: list[Tensor]) -> Tensor:
        return weights @ jd.gramian(made, route="layerwise")(params, x, 0) @ weights

    found = torch.func.grad(read)(params)
    scale = sum(grad.norm() for grad in expected) + length.detach() + 1e-3
    gaps = [(a - b).norm() / scale for a, b in zip(found, expected, strict=True)]
    worst = max(map(float, gaps), default=0.0)
    return f"wrong: the derivative of the Gramian by {worst:.1e}" if worst > 1e-8 else "right"


def is_rounding(
    fn: Callable[..., Tensor], params: list[Tensor], x: Tensor, expected: list[Tensor]
) -> bool:
    """Say whether rows are no numbers of their own: one rounding of the inputs changes them."""
    ulp = torch.finfo(x.dtype).eps
    moved, inputs = [p * (1 + ulp) for p in params], x * (1 - ulp)
    changes = [by_loops(fn, moved, inputs, flag) - rows for flag, rows in enumerate(expected)]
    pairs = zip(changes, expected, strict=True)
    return any(bool(change.norm() > 1e-3 * rows.norm()) for change, rows in pairs)


def _compiled(made: Callable[..., Any], route: str = "layerwise") -> Callable[..., Any]:
    """Return the compiled step of an objective."""
    torch._dynamo.reset()
    return torch.compile(_step(made, route), fullgraph=True, backend="aot_eager")


def _drawn(step: Callable[..., Any], params: list[Tensor], given: Tensor, flag: int) -> Any:
    """Return a Gramian and a pullback, with the same draws whenever this is called."""
    torch.manual_seed(0)
    m = len(given) if given.ndim > 2 else given.shape[-1]
    return step(
        params, given, flag, torch.linspace(-1, 1.5, m, dtype=given.dtype, device=given.device)
    )


def _compared(
    step: Callable[..., Any],
    params: list[Tensor],
    given: Tensor,
    expected: list[Tensor],
    dtype: torch.dtype,
) -> str:
    """Run a step three times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for flag in (0, 1, 0):
            rows = expected[flag % 2]
            weights = torch.linspace(-1, 1.5, len(rows), dtype=dtype, device=rows.device)
            gramian, grad = step(params, given, flag, weights)
            gaps = [gramian - rows @ rows.T, grad - weights @ rows]
            scale = rows.norm() + 1e-3
            tol = 1e-9 if dtype is torch.float64 else 2e-3
            if not all(
                bool(gap.norm() <= tol * scale ** (2 - k) * 3) for k, gap in enumerate(gaps)
            ):
                return f"wrong: {gaps[0].norm() / scale**2:.1e} {gaps[1].norm() / scale:.1e}"
    said = ("must be", "is not the sum", "without a plan")
    warned = any(text in str(w.message) for w in caught for text in said)
    return "warned" if warned else "right"


def _step(fn: Callable[..., Any], route: Any = "layerwise") -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function to a Gramian and a pullback."""

    def step(params: Any, x: Tensor, flag: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        _, gramian, vjp_fn = jd.gramian_vjp(fn, params, x, flag, route=route)
        return gramian, torch.cat([grad.flatten() for grad in vjp_fn(weights)])

    return step


def main() -> int:
    """Run programs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--first", choices=("call", "init_state", "nothing"), default="call")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    dtype = torch.float32 if given.float32 else torch.float64
    for number in range(given.n):
        seed = given.seed * 10**6 + number
        try:
            result = outcome(
                seed,
                compiled=given.compiled,
                dtype=dtype,
                first=given.first,
                device=given.device,
            )
        except Exception as error:
            result = f"raised: {type(error).__name__}: {str(error)[:120]}"
            if given.n == 1:
                traceback.print_exc()
        counts[result.split(":")[0]] += 1
        if result.startswith(("wrong", "raised", "warned")):
            print(seed, LAYOUTS[(0, 0, 0, 1, 2)[seed % 5]], result)
    print(dict(counts))
    return int(counts["wrong"] + counts["raised"] > 0)


if __name__ == "__main__":
    sys.exit(main())
