"""Models that the tests of loops share."""

from typing import Any

import torch
from torch import nn

M = 5
LR = 0.1
X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(seed=0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, M)).double()


def losses_of(out):
    """Return five losses, in a dict whose keys are not in order."""
    return {"b": out[:, 1:].square().mean(0) + 0.5, "a": (out[:, 0] - 1).square().mean() + 0.1}


def descend(params):
    """Take a step along `.grad`, and forget it."""
    with torch.no_grad():
        for param in params:
            if param.grad is not None:
                param -= LR * param.grad
                param.grad = None


def grads_of(target) -> Any:
    """Return `.grad` by name."""
    return {name: param.grad for name, param in target.named_parameters()}


class Tasks(nn.Module):
    """A trunk and heads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(3, 1) for name in ("a", "b", "c")})

    def losses(self, x, names=("a", "b", "c")):
        """Return the features, and a loss for each name."""
        z = self.trunk(x)
        return z, {name: self.heads[name](z).sub(i).square().mean() for i, name in enumerate(names)}


def tasks() -> Any:
    torch.manual_seed(1)
    return Tasks().double()
