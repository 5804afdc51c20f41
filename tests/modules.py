"""Real modules: what each is, on which routes it runs, and the message where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import torchjd_func as jd

ROUTES = ("jacobian", "layerwise", "product")
MODES = ("eager", "compiled")
ANY = "*"


def first_of(out: Any) -> Tensor:
    """Return the output of a module that may return states or weights beside it."""
    return out[0] if isinstance(out, tuple) else out


def three_losses(out: Any) -> Tensor:
    """Return three losses of an output whose last dimension is at least three."""
    return (first_of(out)[..., :3].tanh() - 0.3).square().reshape(-1, 3).mean(0)


def features(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Return the factory of one floating input."""
    return lambda: (torch.randn(*shape),)


def tokens(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Return the factory of one input of indices below 6."""
    return lambda: (torch.randint(6, shape),)


VECTORS = features(4, 5)


@dataclass(frozen=True)
class Case:
    """A module, its inputs, and the cells of the table that are errors.

    Attributes:
        module: Factory of the module.
        inputs: Factory of its inputs.
        losses: From the output to `(3,)`.
        train: Whether in training mode.
        trains: Whether a parameter of this name is trained; others are frozen.
        dtype: Precision inside; the oracle is in float64.
        scaled: Whether the loss is scaled.
        tol: Relative tolerance.
        fails: `{(route, mode): message}`, where `"*"` stands for any.
        slow: Routes on which torch has no batching rule, loops instead, and warns.
        rows: Whether layer by layer, too, its rows cost one backward pass for each loss.
        instead: What to use where it is slow or an error.
    """

    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]] = VECTORS
    losses: Callable[[Any], Tensor] = three_losses
    train: bool = True
    trains: Callable[[str], bool] = lambda name: True
    dtype: torch.dtype = torch.float64
    scaled: bool = False
    tol: float = 1e-9
    fails: dict[tuple[str, str], str] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    rows: bool = False
    instead: str = ""

    def message(self, route: str, mode: str) -> str | None:
        """Return the message of a cell that is an error."""
        keys = ((route, mode), (route, ANY), (ANY, mode), (ANY, ANY))
        return next((self.fails[key] for key in keys if key in self.fails), None)


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mix(self.embed(ids)).tanh())


class Cells(nn.Module):
    """A recurrent network written as a loop over a cell."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(5, 4)

    def forward(self, x):
        state, outs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outs.append(first_of(state))
        return torch.stack(outs, 1)


class Attention(nn.Module):
    """Self-attention, with torch's kernels or with the plain one."""

    def __init__(self, plain: bool):
        super().__init__()
        self.plain = plain
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        if not self.plain:
            return self.attend(x, x, x, need_weights=False)[0]
        with sdpa_kernel(SDPBackend.MATH):
            return self.attend(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """A transformer layer on the plain attention kernel.

    No dropout: torch.func draws other masks for tensors that are not contiguous (torch 2.13).
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return self.layer(x)


class Physics(nn.Module):
    """Residual, boundary and data losses of u'' + u = 0, differentiated inside."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        u = lambda t: self.net(t.reshape(1))[0]  # ruff: ignore[lambda-assignment]
        points = x[:, 0]
        residual = vmap(grad(grad(u)))(points) + vmap(u)(points)
        slope = grad(u)(points[0])
        return torch.stack([residual, slope.expand(4), vmap(u)(points) - points.sin()], 1)


class Complex(nn.Module):
    """A layer with complex weights and real outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).abs()


def mlp(*middle: nn.Module) -> nn.Sequential:
    """Return two layers with something between."""
    return nn.Sequential(nn.Linear(5, 4), *middle, nn.Linear(4, 3))


def convolutions() -> nn.Module:
    """Return convolutions, group normalisation and pooling."""
    parts = (nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 3))


def hooked() -> nn.Module:
    """Return a module with a backward hook."""
    model = mlp(nn.Tanh())
    model[0].register_full_backward_hook(lambda *args: None)
    return model


def compiled_inside() -> nn.Module:
    """Return a module with a part that is compiled by itself."""
    model = mlp(nn.Tanh())
    model[0].compile(backend="eager")
    return model


def recurrent(kind: Callable[..., nn.Module]) -> Case:
    """Return the case of a recurrent module."""
    return Case(
        lambda: kind(5, 4, batch_first=True),
        features(2, 3, 5),
        fails={(ANY, "compiled"): "`model` must be a module that torch.compile can capture"},
        instead=f"compiled: a loop over `{getattr(kind, '__name__', kind)}Cell`",
    )


KERNEL = {("product", ANY): "derivative for aten::_scaled_dot_product_flash"}
BAG = {("product", ANY): "derivative for '_embedding_bag_backward' is not implemented"}


def refused(message: str) -> dict[tuple[str, str], str]:
    """Return an error in each cell."""
    return {(ANY, ANY): message}


CASES = {
    "`Linear`, activations": Case(lambda: mlp(nn.Tanh(), nn.Linear(4, 4), nn.GELU())),
    "`Conv2d`, `GroupNorm`, pooling": Case(convolutions, features(4, 2, 7, 7)),
    "`BatchNorm`, training": Case(lambda: mlp(nn.BatchNorm1d(4))),
    "`BatchNorm`, evaluating": Case(lambda: mlp(nn.BatchNorm1d(4)), train=False),
    "`LayerNorm`, `RMSNorm`": Case(lambda: mlp(nn.LayerNorm(4), nn.RMSNorm(4))),
    "`Dropout`, training": Case(lambda: mlp(nn.Dropout(0.4))),
    "`RNN`": recurrent(nn.RNN),
    "`LSTM`": recurrent(nn.LSTM),
    "`GRU`": recurrent(nn.GRU),
    "`RNNCell` in a loop": Case(lambda: Cells(nn.RNNCell), features(2, 3, 5)),
    "`LSTMCell` in a loop": Case(lambda: Cells(nn.LSTMCell), features(2, 3, 5)),
    "`GRUCell` in a loop": Case(lambda: Cells(nn.GRUCell), features(2, 3, 5)),
    "`MultiheadAttention`": Case(
        lambda: Attention(False),
        features(2, 3, 4),
        fails=KERNEL,
        slow=("jacobian",),
        instead="`sdpa_kernel(SDPBackend.MATH)`, or `chunk_size=1`",
    ),
    "`MultiheadAttention`, kernel `MATH`": Case(lambda: Attention(True), features(2, 3, 4)),
    "`TransformerEncoderLayer`, kernel `MATH`": Case(Encoder, features(2, 3, 4)),
    "`Embedding`": Case(
        lambda: nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 3)), tokens(4, 3)
    ),
    "`EmbeddingBag`": Case(
        lambda: nn.EmbeddingBag(6, 4),
        tokens(4, 3),
        fails=BAG,
        slow=("jacobian",),
        instead="`Embedding` and a mean",
    ),
    "tied weights": Case(Tied, tokens(4, 3)),
    "frozen backbone": Case(lambda: mlp(nn.Tanh()), trains=lambda name: name.startswith("2.")),
    "`weight_norm`, `spectral_norm`": Case(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 4)),
            parametrizations.spectral_norm(nn.Linear(4, 3)),
        ),
    ),
    "physics losses (derivatives inside)": Case(Physics, lambda: (torch.rand(4, 1),), rows=True),
    "complex parameters": Case(Complex, rows=True),
    "float32": Case(lambda: mlp(nn.Tanh()), dtype=torch.float32, tol=1e-4),
    "bfloat16 by `cast_floating`": Case(lambda: mlp(nn.Tanh()), dtype=torch.bfloat16, tol=0.1),
    "float16 by `cast_floating`, `loss_scale`": Case(
        lambda: mlp(nn.Tanh()),
        dtype=torch.float16,
        scaled=True,
        tol=0.02,
    ),
    "`Embedding(sparse=True)`": Case(
        lambda: nn.Sequential(nn.Embedding(6, 4, sparse=True)),
        tokens(4, 3),
        fails=refused(r"`model\.0` must have dense gradients"),
        instead="`sparse=False`",
    ),
    "`Embedding(max_norm=...)`": Case(
        lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=1.0)),
        tokens(4, 3),
        fails=refused(r"`model\.0` must not overwrite its weight"),
        instead="normalise after each step",
    ),
    "full backward hooks": Case(
        hooked,
        fails=refused(r"`model\.0` must have no backward hooks"),
        instead="look at what `jd.jac` returns",
    ),
    "`DataParallel`, `DistributedDataParallel`": Case(
        lambda: nn.Sequential(nn.DataParallel(mlp(nn.Tanh()))),
        fails=refused(r"`model\.0` must not be a wrapper that distributes a module"),
        instead="`model.module`, with `jd.distributed`",
    ),
    "a compiled module inside": Case(
        compiled_inside,
        fails=refused(r"`model\.0` must not be compiled by itself"),
        instead="compile the whole step",
    ),
}


def build(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the module and its inputs, the same at each call, in float64."""
    torch.manual_seed(0)
    module, inputs = case.module().train(case.train), case.inputs()
    module = module.double()
    return module, tuple(x.double() if x.is_floating_point() else x for x in inputs)


def objective_of(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the functional objective of a case with its buffers as auxiliary output."""
    module, inputs = build(case)
    apply, params, buffers = jd.functionalize(module)
    trained = {name: leaf for name, leaf in params.items() if case.trains(name)}
    frozen = {name: leaf for name, leaf in params.items() if name not in trained}

    def objective(params, frozen, buffers, *inputs):
        out, buffers = apply(frozen | params, buffers, *inputs)
        return case.losses(out), buffers

    args = (trained, frozen, buffers, *inputs)
    if case.dtype == torch.float64:
        return objective, args
    single = tuple(to_float32(arg) for arg in args)
    if case.dtype == torch.float32:
        return objective, single
    half = jd.cast_floating(objective, case.dtype)
    return (jd.loss_scale.scaled(half, jd.loss_scale.init()) if case.scaled else half), single


def to_float32(arg: Any) -> Any:
    """Convert the floating tensors of one argument."""
    convert = lambda x: x.float() if x.is_floating_point() else x  # ruff: ignore[lambda-assignment]
    return {k: convert(v) for k, v in arg.items()} if isinstance(arg, dict) else convert(arg)


def step_of(case: Case, route: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function of a cell, to be compiled or not, and its arguments."""
    objective, args = objective_of(case)

    def step(*args):
        out = jd.gramian_vjp(objective, *args, has_aux=True, route=route)
        losses, gramian, vjp_fn, buffers = out
        return losses, gramian, vjp_fn(losses.detach()), buffers

    return step, args


def by_loops(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return what `step_of` should, from the module itself and one backward pass for each loss."""
    module, inputs = build(case)
    torch.manual_seed(1)
    losses = case.losses(module(*inputs))
    weights = losses.detach()
    params = {name: param for name, param in module.named_parameters() if case.trains(name)}
    rows = [
        torch.autograd.grad(loss, list(params.values()), retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    gramian = torch.stack([torch.stack([inner(a, b) for b in rows]) for a in rows])
    columns = zip(params, zip(*rows, strict=True), strict=True)
    pulled = {
        name: torch.tensordot(weights.to(column[0].dtype), torch.stack(column), 1)
        for name, column in columns
    }
    return weights, gramian, pulled, dict(module.named_buffers())


def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """Return the real inner product of two gradients."""
    return sum(((x * y.conj()).real.sum() for x, y in zip(a, b, strict=True)), torch.zeros(()))
