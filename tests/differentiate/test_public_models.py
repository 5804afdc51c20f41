"""Models that nobody here wrote: right, and the parameters that take rows by autograd are few."""

from typing import Any

import pytest
import torch

import torchjd_func as jd
from benchmarks._public_models import NAMES, build

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Parameters that no form is for: tables cut by relative position
BY_AUTOGRAD = {
    "DebertaV2ForMaskedLM": ("rel_embeddings", "pos_key_proj", "pos_query_proj", "LayerNorm"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_public_models_are_right_by_factors(name):
    losses, params, batch = build(name, transformers)
    objective = jd.instancewise(losses)
    _, gramian, vjp_fn = jd.gramian_vjp(objective, params, *batch)
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    options: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    rows = [
        torch.autograd.grad(x, list(leaves.values()), **options) for x in losses(leaves, *batch)
    ]
    matrix = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    expected = matrix @ matrix.mT
    assert (gramian - expected).abs().max() <= 1e-8 * expected.abs().max()
    weights = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    grads = vjp_fn(weights)
    flat = torch.cat([grads[key].flatten() for key in params])
    assert (flat - weights @ matrix).abs().max() <= 1e-8 * matrix.abs().max()
    by_autograd = [
        line.path
        for line in jd.explain_gramian(objective, params, *batch).leaves
        if line.contraction == "m backward passes"
    ]
    known = BY_AUTOGRAD.get(name, ())
    assert [path for path in by_autograd if not any(part in path for part in known)] == []
