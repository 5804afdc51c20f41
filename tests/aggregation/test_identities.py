"""Identities across methods, over the registry or on drawn matrices."""

import pytest
import torch
from hypothesis import given, settings

import torchjd_func as jd
from tests.helpers import weights_of
from tests.matrices import jacobians, matrix
from tests.registry import METHODS, fresh, losses_for, run

SYMMETRIC = {  # weights that follow a permutation of the rows, and losses if they need them
    name: method
    for name, method in METHODS.items()
    if method.equivariant and not method.random and method.make(6).weighting is not None
}


def test_upgrad_and_dualproj_are_the_mean_where_nothing_conflicts():
    jac = matrix("gaussian", 4, 6, seed=1).abs()
    for rule in (jd.upgrad(), jd.dualproj()):
        assert torch.equal(rule(jac)[0], jd.mean()(jac)[0])


def test_of_two_objectives_upgrad_is_half_of_pcgrad():
    for seed in range(10):
        jac = matrix("gaussian", 2, 3, seed)
        twice = run(METHODS["pcgrad"], jac, 2)
        torch.testing.assert_close(2 * jd.upgrad()(jac)[0], twice)


@pytest.mark.parametrize("seed", range(10))
def test_dual_cone_gradient_descent_of_two_losses_is_known_here(seed):
    # Y. Hwang, D.-Y. Lim, Dual Cone Gradient Descent, NeurIPS 2024, arXiv:2409.18426.
    jac = matrix("gaussian", 2, 3, seed)
    total, unit = jac.sum(0), jac / jac.norm(dim=1, keepdim=True)
    bisector = unit.sum(0)
    center = (bisector @ total) / (bisector @ bisector) * bisector
    torch.testing.assert_close(jd.config()(jac)[0], center)
    slopes, projected = jac @ total, total
    for row, slope in zip(jac, slopes, strict=True):
        if slope < 0:
            projected = total - slope / (row @ row) * row
    torch.testing.assert_close(2 * jd.dualproj()(jac)[0], projected)
    if jac[0] @ jac[1] < 0:
        apart = [total - (total @ row) / (row @ row) * row for row in jac]
        torch.testing.assert_close(jd.upgrad()(jac)[0], 0.5 * (apart[0] + apart[1]))


@given(jacobians())
@settings(deadline=None, max_examples=60)
def test_mgda_improves_all_objectives_by_at_least_its_square_and_is_the_shortest(jac):
    direction = jd.mgda()(jac)[0]
    norms = jac.norm(dim=-1)
    rounding = 1e-9 * norms * norms.max() + 1e-28 * norms.max() ** 2
    assert (jac @ direction >= direction.square().sum() - rounding).all()
    assert (direction.norm() <= norms * (1 + 1e-12) + 1e-12 * norms.max()).all()


def test_a_gradient_of_zero_stops_mgda_exactly():
    for column in ([0.4623, 0.8867, 0.0], [0.0, 1.0, 1.0, 3.0, 0.0]):
        jac = torch.tensor(column, dtype=torch.float64).unsqueeze(-1)
        assert jd.mgda()(jac)[0] == 0


def test_a_repeated_row_does_not_change_mgda():
    jac = matrix("gaussian", 3, 5, seed=2)
    repeated = torch.cat([jac, jac[:1]])
    torch.testing.assert_close(jd.mgda()(repeated)[0], jd.mgda()(jac)[0])


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.make(6).weighting is not None])
def test_a_rotation_of_the_parameters_leaves_the_weights(name):
    method, jac = METHODS[name], matrix("gaussian", 6, 9, seed=4)
    rotation, _ = torch.linalg.qr(matrix("gaussian", 9, 9, seed=5))
    got, want = run(method, jac @ rotation, 6), run(method, jac, 6)
    torch.testing.assert_close(got, want @ rotation, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_permutation_of_the_rows_permutes_the_weights(name):
    method, jac = SYMMETRIC[name], matrix("gaussian", 6, 9, seed=6)
    aggregator, state = fresh(method, jac, 6)
    assert aggregator.weighting is not None
    losses, order = losses_for(method, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = None if losses is None else losses[order]
    want, _ = aggregator.weighting(jac @ jac.mT, state, losses=losses)
    got, _ = aggregator.weighting(jac[order] @ jac[order].mT, state, losses=shuffled)
    torch.testing.assert_close(got, want[order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("power", [-6, 6])
@pytest.mark.parametrize(
    "rule",
    [
        jd.upgrad(),
        jd.dualproj(),
        jd.mgda(),
        jd.cagrad(),
        jd.imtl_g(),
        jd.aligned_mtl(),
        jd.config(),
    ],
    ids=repr,
)
def test_one_scale_for_all_gradients_leaves_the_weights(rule, power):
    jac = matrix("gaussian", 5, 8, seed=7)
    gramian = jac @ jac.mT
    got, want = weights_of(rule, 10.0 ** (2 * power) * gramian), weights_of(rule, gramian)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
