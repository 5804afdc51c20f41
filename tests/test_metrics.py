"""Metrics against numbers found by hand, and by counting."""

import itertools
import sys

import pytest
import torch
from torch.func import grad, vmap

import torchjd_func as jd
from tests.helpers import close, compiled, double
from tests.matrices import A, B, C, matrix

HIGHER = [True, False, True]
BASE, NEW = double(96.0, 98.0, 0.2), double(93.0, 99.0, 0.5)


def test_deltas_of_the_worked_example():
    drop = (3 / 96 + 1 / 98 - 0.3 / 0.2) / 3 * 100
    close(jd.metrics.delta_m(NEW, BASE, HIGHER), drop)
    gain = (-(3 / 96 + 1 / 98) / 2 + 0.3 / 0.2) / 2 * 100
    close(jd.metrics.delta_p(NEW, BASE, HIGHER, ["a", "a", "b"]), gain)
    close(jd.metrics.delta_p(NEW, BASE, HIGHER), -drop)
    assert (round(drop, 2), round(gain, 2)) == (-48.62, 73.96)


def test_deltas_of_a_baseline_against_itself_are_zero():
    close(jd.metrics.delta_m(BASE, BASE, HIGHER), 0.0)
    close(jd.metrics.delta_p(BASE, BASE, HIGHER, [0, 1, 0]), 0.0)


def test_deltas_of_many_methods():
    many = torch.stack([NEW, BASE, 2 * NEW])
    flags = torch.tensor(HIGHER)
    for metric in (jd.metrics.delta_m, jd.metrics.delta_p):
        want = torch.stack([metric(row, BASE, HIGHER) for row in many])
        close(metric(many, BASE, flags), want)
        close(vmap(lambda row, f=metric: f(row, BASE, HIGHER))(many), want)
        close(compiled(lambda rows, f=metric: f(rows, BASE, HIGHER))[0](many), want)


def test_delta_improves_with_the_metric():
    slope = grad(lambda values: jd.metrics.delta_m(values, BASE, HIGHER))(NEW)
    assert (slope.sign() == double(-1.0, 1.0, -1.0)).all()


def test_mean_rank_shares_ties():
    values = double(0.9, 3.0, 0.8, 1.0, 0.9, 2.0, 0.9, 2.0).reshape(4, 2)
    # Accuracies: three share ranks 1 to 3, one is fourth. Errors: two share ranks 2 and 3.
    close(jd.metrics.mean_rank(values, [True, False]), [3.0, 2.5, 2.25, 2.25])
    both = torch.stack([values, values.flip(0)])
    want = [[3.0, 2.5, 2.25, 2.25], [2.25, 2.25, 2.5, 3.0]]
    close(jd.metrics.mean_rank(both, torch.tensor([True, False])), want)


def test_a_method_that_diverged_has_no_rank():
    values = double(0.9, 3.0, torch.nan, 1.0, 0.8, 2.0).reshape(3, 2)
    ranks = jd.metrics.mean_rank(values, [True, False])
    close(ranks[[0, 2]], [2.0, 2.0])
    assert ranks[1].isnan()


def counted(points: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the volume by inclusion and exclusion: the reference, exponential in the points."""
    boxes = [(reference - point).clamp(min=0) for point in points]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, size):
            total += -((-1) ** size) * float(torch.stack(some).amin(0).prod())
    return total


def test_hypervolume_by_hand():
    plane = double(1, 4, 2, 2, 4, 1).reshape(3, 2)
    close(jd.metrics.hypervolume(plane, double(5, 5)), 11.0)
    close(jd.metrics.hypervolume(double(3.0, 1.0, 9.0).unsqueeze(1), double(4.0)), 3.0)
    for m in (1, 2):
        empty = torch.zeros(0, m, dtype=torch.float64)
        close(jd.metrics.hypervolume(empty, torch.ones(m).double()), 0.0)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_hypervolume_by_counting(k, m):
    if m > 2:
        pytest.importorskip("moocore")
    generator = torch.Generator().manual_seed(10 * k + m)
    # Some points are equal, some dominated, some outside.
    points = torch.randint(0, 7, (k, m), generator=generator).double()
    reference = torch.full((m,), 5.0, dtype=torch.float64)
    close(jd.metrics.hypervolume(points, reference), counted(points, reference))


def test_hypervolume_in_space_by_hand():
    pytest.importorskip("moocore")
    space = torch.tensor([[1.0, 2, 3], [2, 1, 2], [3, 3, 1]])
    got = jd.metrics.hypervolume(space, torch.full((3,), 4.0))
    assert got.dtype == torch.float32
    close(got, 15.0)


def test_hypervolume_of_points_that_are_not_finite():
    points, reference = torch.ones(3, 3).double(), torch.full((3,), 2.0).double()
    points[0] = torch.nan
    points[1] = torch.inf
    close(jd.metrics.hypervolume(points, reference), 1.0)
    points[2, 0] = -torch.inf
    assert jd.metrics.hypervolume(points, reference) == torch.inf
    close(jd.metrics.hypervolume(points[:2], reference), 0.0)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_hypervolume_of_a_reference_that_is_not_finite(m):
    points, reference = torch.ones(2, m).double(), torch.full((m,), 2.0).double()
    points[1] = 0.5
    for value in (torch.inf, torch.nan):
        reference[-1] = value
        got = jd.metrics.hypervolume(points, reference)
        assert torch.equal(got, double(value).squeeze()) or (value != value and got.isnan())
    points, reference = double(1.0, 2.0).expand(2, 2), double(torch.inf, torch.inf)
    assert jd.metrics.hypervolume(points, reference) == torch.inf


def test_hypervolume_of_the_plane_is_a_torch_function():
    sets = torch.randint(0, 7, (5, 4, 2), generator=torch.Generator().manual_seed(0)).double()
    reference = double(5.0, 6.0)
    want = double(*[counted(points, reference) for points in sets])
    mapped = vmap(lambda points: jd.metrics.hypervolume(points, reference))
    close(mapped(sets), want)
    close(compiled(mapped)[0](sets), want)
    slope = grad(lambda points: jd.metrics.hypervolume(points, double(5, 5)))(
        double(1, 4, 2, 2, 4, 1).reshape(3, 2)
    )
    # Moving a point widens it by its own share of the front.
    close(slope, [[-1.0, -1.0], [-2.0, -2.0], [-1.0, -1.0]])


def test_hypervolume_names_the_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    with pytest.raises(ImportError, match=r"'\.\[metrics\]'"):
        jd.metrics.hypervolume(torch.zeros(2, 3), torch.ones(3))


def test_pairwise_cosine_by_hand():
    for jac, want in (
        (A, [-0.84119102]),
        (B, [0.0, -0.30151134, -0.30151134]),
        (C, [-0.89442719, -0.80873608, 0.46031716]),
    ):
        got = jd.metrics.pairwise_cosine(jac @ jac.T)
        close(got[*torch.triu_indices(len(jac), len(jac), 1)], want)
        close(got.diagonal(), torch.ones(len(jac)).double())
    zero = torch.diag(double(0.0, 2.0))
    close(jd.metrics.pairwise_cosine(zero), torch.diag(double(0.0, 1.0)))


def test_stationarity_gap_by_hand():
    close(jd.metrics.stationarity_gap(C @ C.T), 0.0, atol=1e-7)
    # The minimum of |w a + (1 - w) b| over [0, 1] on the line through the two rows.
    a, b = A
    w = ((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1)
    want = (w * a + (1 - w) * b).norm()
    close(jd.metrics.stationarity_gap(A @ A.T), want)
    close(jd.metrics.stationarity_gap(A @ A.T, relative=True), want / b.norm())
    zero = torch.zeros(2, 2, dtype=torch.float64)
    close(jd.metrics.stationarity_gap(zero, relative=True), 0.0)


def test_the_gap_keeps_its_digits_under_autocast():
    gramian = torch.tensor([[3000.1, -1000.3], [-1000.3, 2000.7]])
    with torch.autocast("cpu", torch.bfloat16):
        got = jd.metrics.stationarity_gap(gramian)
    close(got, jd.metrics.stationarity_gap(gramian.double()).float(), atol=1e-4)


def test_metrics_of_gradients_are_batched():
    jacs = torch.stack([matrix("gaussian", 3, 4, seed) for seed in range(4)])
    gramians = (jacs @ jacs.mT).unflatten(0, (2, 2))
    for metric in (jd.metrics.pairwise_cosine, jd.metrics.stationarity_gap):
        want = torch.stack([metric(jac @ jac.T) for jac in jacs]).unflatten(0, (2, 2))
        close(metric(gramians), want)


ERRORS = {
    "baseline": lambda: jd.metrics.delta_m(NEW, BASE[:2], HIGHER),
    "higher_is_better": lambda: jd.metrics.delta_p(NEW, BASE, HIGHER[:2]),
    "tasks": lambda: jd.metrics.delta_p(NEW, BASE, HIGHER, ["a"]),
    "points, reference": lambda: jd.metrics.hypervolume(A, double(1.0, 2.0)),
    "gramian": lambda: jd.metrics.pairwise_cosine(A),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_fault(name):
    with pytest.raises(ValueError, match=name):
        ERRORS[name]()
