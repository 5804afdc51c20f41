"""Small networks that use parameters in every way that has a rule, and in ways that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

B = 4  # examples


class Lambda(nn.Module):
    """A module from a function of the module and its input."""

    def __init__(self, fn: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


@dataclass(frozen=True)
class Specimen:
    """A network, its input, and what becomes of its parameters."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0  # inputs are integers below this
    opaque: bool = False  # some parameter has no rule
    vmaps: bool = True  # torch.func.vmap takes it, for one loss per example


def par(*shape: int) -> nn.Parameter:
    """Return a parameter."""
    return nn.Parameter(torch.randn(shape))


def transformer(batch_first: bool) -> nn.Module:
    """Return a language model with position table, class token and tied output layer."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)

    def run(self: Any, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        h = torch.cat([self.first.expand(x.shape[0], -1, -1), h], 1)
        h = self.layer(h if batch_first else h.transpose(0, 1))
        h = h if batch_first else h.transpose(0, 1)
        return F.linear(self.norm(h) * self.scale, self.words.weight)

    return Lambda(
        run,
        words=nn.Embedding(11, 6, padding_idx=2),
        places=nn.Embedding(B, 6),
        first=par(1, 1, 6),
        layer=layer,
        norm=nn.LayerNorm(6),
        scale=par(6),
    )


def unrolled(self: Any, x: Tensor) -> Tensor:
    """Run a recurrent network, step by step, with one weight used at each."""
    h = x.new_zeros(x.shape[0], 3)
    for t in range(x.shape[1]):
        h = torch.tanh(self.a(x[:, t]) + self.b(h))
    return h


def attend(self: Any, x: Tensor) -> Tensor:
    """Attend with separate keys and values, a mask, and the weights as an output."""
    mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    mixed, weights = self.mha(x, x * 2, x[..., :5], attn_mask=mask, need_weights=True)
    return torch.cat([mixed, weights], -1)


def functional(self: Any, x: Tensor) -> Tensor:
    """Write layers by hand."""
    h = torch.tanh(x @ self.w + self.b)
    h = torch.einsum("bi,ij->bj", h, self.u.t())
    h = torch.addmm(self.c, h, self.v.reshape(3, 2))
    return h / torch.exp(self.log_scale) + self.log_scale.square().sum()


SEQUENCE = (B, B, 6)  # as many positions as examples, so that mixing them up shows
IMAGE = (B, 4, 6, 6)

ZOO: dict[str, Specimen] = {
    "mlp": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), (B, 5)
    ),
    "linear on sequences": Specimen(lambda: nn.Sequential(nn.Linear(6, 7), nn.GELU()), SEQUENCE),
    "flattened sequences": Specimen(
        lambda: Lambda(
            lambda s, x: s.f(x.reshape(-1, 6)).relu().view(x.shape[0], -1), f=nn.Linear(6, 3)
        ),
        SEQUENCE,
    ),
    "time first": Specimen(
        lambda: Lambda(
            lambda s, x: s.g(s.f(x.transpose(0, 1)).tanh() * s.p).permute(1, 0, 2),
            f=nn.Linear(6, 3),
            p=par(3),
            g=nn.LayerNorm(3),
        ),
        SEQUENCE,
    ),
    "time first, flattened": Specimen(
        lambda: Lambda(
            lambda s, x: s.f(x.transpose(0, 1).reshape(-1, 6)).view(-1, B, 3).sum(0),
            f=nn.Linear(6, 3),
        ),
        SEQUENCE,
        opaque=True,
        vmaps=False,
    ),
    "split into heads": Specimen(
        lambda: Lambda(
            lambda s, x: s.g(s.f(x).unflatten(-1, (2, 4)).tanh()),
            f=nn.Linear(6, 8),
            g=nn.Linear(4, 3),
        ),
        SEQUENCE,
    ),
    "bilinear": Specimen(
        lambda: Lambda(lambda s, x: s.f(x[:, 0], x[:, 1].tanh()), f=nn.Bilinear(6, 6, 2)), SEQUENCE
    ),
    "conv1d": Specimen(
        lambda: nn.Sequential(nn.Conv1d(6, 4, 2, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3)),
        (B, 6, 5),
    ),
    "conv2d": Specimen(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.GroupNorm(2, 6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2, groups=2, dilation=2, padding="same"),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        IMAGE,
    ),
    "depthwise": Specimen(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.SiLU(), nn.Conv2d(4, 2, 1)), IMAGE
    ),
    "conv3d": Specimen(lambda: nn.Conv3d(2, 3, (2, 1, 2), padding=(0, 1, 1)), (B, 2, 3, 3, 3)),
    "transposed convolutions": Specimen(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.Flatten(2),
            nn.ConvTranspose1d(6, 2, 2, dilation=2),
        ),
        IMAGE,
    ),
    "instance norm and PReLU": Specimen(
        lambda: nn.Sequential(nn.Conv2d(4, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.PReLU(3)),
        IMAGE,
    ),
    "batch norm in eval mode": Specimen(
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
        ).eval(),
        (B, 5),
    ),
    "RMS norm": Specimen(lambda: nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4)), SEQUENCE),
    "bag of embeddings": Specimen(
        lambda: nn.Sequential(nn.EmbeddingBag(11, 4), nn.Linear(4, 3)), (B, 3), 11, vmaps=False
    ),
    "transformer": Specimen(lambda: transformer(True), (B, B), 11),
    "transformer, time first": Specimen(lambda: transformer(False), (B, B), 11),
    "attention with a mask": Specimen(
        lambda: Lambda(attend, mha=nn.MultiheadAttention(6, 2, vdim=5, batch_first=True)), SEQUENCE
    ),
    "by hand": Specimen(
        lambda: Lambda(
            functional, w=par(5, 4), b=par(4), u=par(3, 4), v=par(2, 3), c=par(2), log_scale=par(2)
        ),
        (B, 5),
    ),
    "weight norm": Specimen(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 4)),
            nn.Tanh(),
            parametrizations.spectral_norm(nn.Linear(4, 3)),
        ).eval(),
        (B, 5),
    ),
    "tied weights": Specimen(
        lambda: Lambda(
            lambda s, x: F.linear(torch.tanh(s.f(x)), s.f.weight.t()) @ s.f.weight.t(),
            f=nn.Linear(6, 4),
        ),
        (B, 6),
    ),
    "recurrent, unrolled": Specimen(
        lambda: Lambda(unrolled, a=nn.Linear(6, 3), b=nn.Linear(3, 3, bias=False)), SEQUENCE
    ),
    "recurrent cell": Specimen(
        lambda: Lambda(
            lambda s, x: s.out(s.cell(x[:, 0], s.cell(x[:, 1]))),
            cell=nn.GRUCell(6, 3),
            out=nn.Linear(3, 2),
        ),
        SEQUENCE,
        opaque=True,
        vmaps=False,
    ),
    "unused parameter": Specimen(
        lambda: Lambda(lambda s, x: s.f(x), f=nn.Linear(5, 3), rest=par(4)), (B, 5)
    ),
    "no rule": Specimen(
        lambda: Lambda(
            lambda s, x: F.cosine_similarity(s.f(x)[:, None], s.p, dim=2),
            f=nn.Linear(5, 3),
            p=par(2, 3),
        ),
        (B, 5),
        opaque=True,
    ),
}
