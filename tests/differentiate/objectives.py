"""Objectives of every kind of structure, with the same losses as a plain function."""

import torch
from torch.nn import functional as F

import torchjd_func as jd
from torchjd_func import _tree

GENERATOR = torch.Generator().manual_seed(0)
PARAMS = {
    "first": torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR),
    "last": torch.randn(2, 4, dtype=torch.float64, generator=GENERATOR),
}
X = torch.randn(6, 3, dtype=torch.float64, generator=GENERATOR)


def outputs(params, x):
    return F.linear(F.linear(x, params["first"]).tanh(), params["last"])


def tree_losses(params, x):
    out = outputs(params, x)
    return {
        "b": out[:, 0].square().mean(),
        "a": out[:, 1].mean(),
        "c": (out[:, 0] - 1).exp().mean(),
    }


def vector_losses(params, x):
    return _tree.ravel(tree_losses(params, x))


def instance_losses(params, x):
    return outputs(params, x).square().sum(-1)


def example_loss(params, x):
    return instance_losses(params, x)


def inverse(gramian, present=None):
    """Weigh by the inverse of the squared length."""
    squares = gramian.diagonal()
    present = torch.ones_like(squares, dtype=torch.bool) if present is None else present
    there = present & (squares > 0)
    return torch.where(there, 1 / torch.where(there, squares, 1.0), 0.0)


RULE = jd.weighted(jd.stateless("inverse", inverse))
SCALE = jd.loss_scale.init(2.0**10)
OBJECTIVES = {
    "tree": tree_losses,
    "vector": vector_losses,
    "instancewise": jd.instancewise(instance_losses),
    "per_example": jd.per_example(example_loss),
    "accumulate": jd.accumulate(tree_losses, 2),
    "scaled": jd.loss_scale.scaled(tree_losses, SCALE),
    "scaled instancewise": jd.loss_scale.scaled(jd.instancewise(instance_losses), SCALE),
}
ROUTES = ["auto", "jacobian", "layerwise", "product"]

HEADS = {
    "two": lambda p, z, x: (z @ p["w"]).square().mean(),
    "one": lambda p, z, x: {"policy": (z.sum(1) * p).mean(), "entropy": z.exp().mean()},
}
MULTITASK = jd.multitask(lambda shared, x: outputs(shared, x), HEADS)
MULTITASK_PARAMS = (
    PARAMS,
    {
        "one": torch.tensor(0.5, dtype=torch.float64),
        "two": {"w": torch.tensor([0.3, -1.0], dtype=torch.float64)},
    },
)
