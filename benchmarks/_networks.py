"""The networks whose Gramians are measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WORDS = 10, 1000


class Size(NamedTuple):
    """How large a case is."""

    b: int  # examples
    d: int = 512  # features of hidden layers
    t: int = 1  # tokens


class Block(nn.Module):
    """One layer of a transformer, normalised first."""

    def __init__(self, d: int, heads: int = 4):
        """Draw the parameters."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.pack, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features `(b, t, d)` of all tokens."""
        packed = self.pack(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Classifies sequences of tokens by the mean of their features."""

    def __init__(self, d: int, t: int, layers: int = 4):
        """Draw the parameters."""
        super().__init__()
        self.embedding, self.places = nn.Embedding(WORDS, d), nn.Parameter(torch.zeros(t, d))
        self.blocks = nn.Sequential(*(Block(d) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, `(b, CLASSES)`."""
        return self.head(self.blocks(self.embedding(x) + self.places).mean(1))


def mlp(size: Size, p: int = 784) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network of three layers, and the shape of an example."""
    widths = (p, size.d, size.d, CLASSES)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (p,)


def cnn(size: Size) -> tuple[nn.Module, tuple[int, ...]]:
    """Return three convolutions and a linear layer, for images of 32 by 32."""
    layers: list[nn.Module] = []
    for p, q in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(p, q, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, CLASSES)]
    return nn.Sequential(*layers), (3, 32, 32)


MODELS: dict[str, Callable[[Size], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": lambda size: (Transformer(size.d, size.t), (size.t,)),
    "wide": lambda size: mlp(size, size.d),
}
