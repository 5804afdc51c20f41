"""Norms of all gradients, and the mean of clipped ones."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.differentiate.objectives import (
    MULTITASK,
    MULTITASK_PARAMS,
    OBJECTIVES,
    PARAMS,
    ROUTES,
    X,
    tree_losses,
)
from tests.helpers import assert_trees_close, compiled
from torchjd_func import _tree


def norms_of(fn, params=PARAMS):
    return jd.gramian(fn, route="jacobian")(params, X).diagonal().sqrt()


@pytest.mark.parametrize("fn", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("route", ROUTES)
def test_are_the_diagonal_of_the_gramian(fn, route):
    want = norms_of(fn)
    torch.testing.assert_close(jd.row_norms(fn, route=route)(PARAMS, X), want)
    some = jd.row_norms(fn, route=route, where=lambda path: path == "last")(PARAMS, X)
    rows = jd.jac(fn)(PARAMS, X)["last"].flatten(1)
    torch.testing.assert_close(some, rows.norm(dim=1))
    mask = torch.arange(len(want)) != 1
    kept = jd.row_norms(fn, route=route)(PARAMS, X, present=mask)
    torch.testing.assert_close(kept, torch.where(mask, want, 0))


def test_of_tasks_and_of_auxiliary_output():
    got = jd.row_norms(MULTITASK)(MULTITASK_PARAMS, X)
    torch.testing.assert_close(got, norms_of(MULTITASK, MULTITASK_PARAMS))
    norms, aux = jd.row_norms(lambda p, x: (tree_losses(p, x), x.sum()), has_aux=True)(PARAMS, X)
    torch.testing.assert_close(norms, norms_of(tree_losses))
    assert aux == X.sum()


@pytest.mark.parametrize("name", ["tree", "instancewise", "per_example"])
@pytest.mark.parametrize("route", [route for route in ROUTES if route != "auto"])
def test_the_clipped_mean(name, route):
    fn = OBJECTIVES[name]
    norms = norms_of(fn)
    limit = float(norms.median())
    rows = jd.jac(fn)(PARAMS, X)
    weights = (limit / norms).clamp(max=1) / len(norms)
    want = _tree.weighted_sum(rows, weights)
    step = jd.grad(fn, jd.clipped_mean(limit), route=route)
    assert_trees_close(step(None, PARAMS, X)[0], want)
    assert_trees_close(jd.clipped_mean(limit)(rows)[0], want)
    fast, counter = compiled(step)
    assert_trees_close(fast(None, PARAMS, X)[0], want)
    assert counter.graphs == 1


def test_no_products_of_examples_are_taken(monkeypatch):
    from torchjd_func.differentiate import _routes

    def refuse(*args):
        raise AssertionError("a Gramian")

    monkeypatch.setattr(_routes, "gramians", refuse)
    jd.grad(OBJECTIVES["instancewise"], jd.clipped_mean(1.0))(None, PARAMS, X)
    jd.row_norms(OBJECTIVES["instancewise"])(PARAMS, X)


def test_limits_may_be_swept():
    limits = torch.tensor([0.1, 1.0, 1e9], dtype=torch.float64)
    fn = OBJECTIVES["instancewise"]
    mapped = vmap(lambda limit: jd.grad(fn, jd.clipped_mean(limit))(None, PARAMS, X)[0])(limits)
    want = [jd.grad(fn, jd.clipped_mean(float(limit)))(None, PARAMS, X)[0] for limit in limits]
    assert_trees_close(mapped, _tree.stack(want))
    assert_trees_close(want[2], jd.grad(fn, jd.mean())(None, PARAMS, X)[0])
