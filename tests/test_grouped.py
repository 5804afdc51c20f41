"""Groups of parameters that are aggregated apart."""

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_trees_close, compiled
from torchjd_func import _tree
from torchjd_func.differentiate._gramian import contract
from torchjd_func.differentiate._jacobian import rows
from torchjd_func.differentiate._linearize import linearize


def objective(params: dict) -> Tensor:
    """Return five losses that all parameters take part in, the embedding apart."""
    hidden = torch.tanh(
        params["encoder"]["weight"] @ params["embedding"] + params["encoder"]["bias"]
    )
    return (params["head"] * hidden).sin().cumsum(0)


def params(seed: int = 0) -> dict:
    """Return parameters of `objective`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    encoder = {"weight": draw(5, 3), "bias": draw(5)}
    return {"head": draw(5), "encoder": encoder, "embedding": draw(3)}


@pytest.mark.parametrize("route", ["jacobian", "product"])
@pytest.mark.parametrize(
    "groups", [((0, 1, 2, 3),), ((2, 1), (0, 3)), ((3,), (0,), (2,), (1,))], ids=len
)
def test_routes_serve_groups_of_leaves(route, groups):
    linear = linearize(objective, (params(),), 0, False)
    flat = [leaf.flatten(1) for leaf in _tree.leaves(rows(linear, None))]
    jacs = [torch.cat([flat[i] for i in group], dim=1) for group in groups]
    weights = torch.rand(len(groups), 5, dtype=torch.float64)

    def run(point, weights):
        matrices, pullback = contract(linearize(objective, (point,), 0, False), route, None, groups)
        return matrices, pullback(weights)

    matrices, grads = run(params(), weights)
    assert_trees_close(matrices, torch.stack([jac @ jac.mT for jac in jacs]))
    for group, jac, row in zip(groups, jacs, weights, strict=True):
        got = torch.cat([_tree.leaves(grads)[i].flatten() for i in group])
        assert_trees_close(got, jac.mT @ row)
    assert_trees_close(compiled(run)[0](params(), weights), (matrices, grads))
