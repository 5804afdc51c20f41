"""A plan that was made where rows are right by coincidence is not wrong on the next batch."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import torchjd_func as jd
from tests.differentiate.test_layerwise_kinds import AXES, over, rand
from tests.programs import by_loops

PARAMS = [rand(2, 2)]
FIRST = {
    "zeros": torch.zeros(3, 2).double(),
    "equal examples": rand(1, 2).expand(3, 2),
    "equal numbers": torch.ones(3, 2).double(),
    "where activations saturate": 1e4 * rand(3, 2),
    "not finite": torch.full((3, 2), torch.nan).double(),
}


def twice(fn, first, params, *batch):
    """Return the Gramian of a batch after that of another one, and what it should be."""
    objective = jd.instancewise(fn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jd.gramian(objective)(params, *first)
        found = jd.gramian(objective)(params, *batch)
    rows = by_loops(fn, params, *batch)
    return found, rows @ rows.T


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", AXES)
def test_the_first_batch_tells_nothing(name, first):
    found, expected = twice(over(*AXES[name]), (FIRST[first],), PARAMS, rand(3, 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def time_first(params, tokens, labels):
    """Return the loss of each sentence; positions come before sentences."""
    h = params[0][tokens.T.reshape(-1)].tanh() @ params[1]
    h = h.unflatten(0, tokens.T.shape)
    losses = F.cross_entropy(h.flatten(0, 1), labels.T.reshape(-1), reduction="none")
    return losses.unflatten(0, h.shape[:2]).sum(0)


@pytest.mark.parametrize("first", ["equal tokens", "labels ignored", "both"])
def test_the_first_batch_of_tokens_tells_nothing(first):
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(5, (2, 4, 4), generator=generator)
    params = [rand(5, 3), rand(3, 5)]
    equal = torch.zeros_like(tokens) if first != "labels ignored" else tokens
    ignored = torch.full_like(labels, -100) if first != "equal tokens" else labels
    found, expected = twice(time_first, (equal, ignored), params, tokens, labels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_graph_takes_rows_where_nothing_was_proven():
    tokens, labels = torch.arange(16).reshape(4, 4) % 5, torch.arange(16).reshape(4, 4) % 3
    params, objective = [rand(5, 3), rand(3, 5)], jd.instancewise(time_first)
    jd.gramian(objective)(params, tokens, torch.full_like(labels, -100))
    step = torch.compile(jd.gramian(objective), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="compiled without a plan that was proven"):
        found = step(params, tokens, labels)
    rows = by_loops(time_first, params, tokens, labels)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


def test_what_is_known_once_is_not_proven_again(monkeypatch):
    from torchjd_func.differentiate._layerwise import _proof

    proofs, failing = [], _proof.failing
    monkeypatch.setattr(_proof, "failing", lambda recorded: proofs.append(1) or failing(recorded))
    step = jd.gramian(jd.instancewise(lambda p, x: F.linear(x, p[0]).tanh().sum(1)))
    for _ in range(3):
        step(PARAMS, rand(3, 2))
    assert len(proofs) == 2
