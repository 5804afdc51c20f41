"""Guarantees at the edge: rows that balance, any scale, narrow dtypes, repeated eigenvalues."""

import pytest
import torch

import torchjd_func as jd
from tests.matrices import conflict, matrix
from tests.registry import METHODS, run

BOUNDS = {torch.float64: 1e-5, torch.float32: 2e-3}
both_dtypes = pytest.mark.parametrize("dtype", BOUNDS)
BALANCED = torch.tensor(
    [
        [1.9999998, 3.0000001, -2.9999999],
        [-3.0, -4.4999998, 4.5000001],
        [-3.0, -1.0000001, -1.9999998],
        [1.9999999, 1e-7, 1.0000002],
    ],
    dtype=torch.float64,
)
OUTSIDE = (
    torch.tensor([[2.0, -2.001, -3.001], [-4.0, 4.0, 5.998], [1.998, 0.0, -2.999]]),
    torch.tensor([[2.0, 0.0, 2e-3, 3e-3], [-1.0, -1e-3, -2e-3, 0.0], [-1.0, 1e-3, -2e-3, -1e-3]]),
    torch.tensor([[2.998, 1e-3, 1e-3], [-2.999, -1e-3, -1e-3], [-1.002, 0.0, -3.002]]),
)


def nearly_balanced(m, seed):
    """Return rows of which a positive combination is nearly zero."""
    rows = matrix("gaussian", m, 2 + seed % (2 * m), seed=seed)
    shares = 0.1 + jd.random.uniform(jd.random.key(seed), (m - 1, 1), dtype=torch.float64)
    noise = 10.0 ** -(4 + seed % 6) * matrix("gaussian", *rows.shape, seed=seed + 1000)
    return torch.cat([-(shares * rows[1:]).sum(0, keepdim=True), rows[1:]]) + noise


@both_dtypes
@pytest.mark.parametrize("m", [2, 3, 4, 8, 20, 64])
@pytest.mark.parametrize("make", [jd.upgrad, jd.dualproj, jd.mgda])
def test_nearly_balanced_rows_never_conflict_and_are_never_too_long(make, m, dtype):
    for seed in range(40 if m <= 8 else 4):
        jac = nearly_balanced(m, seed).to(dtype)
        direction = make()(jac)[0].double()
        rows = jac.double()
        lowest = (rows @ direction).min() / rows.square().sum(1).max()
        assert lowest >= -BOUNDS[dtype]
        assert direction.norm() <= 1.001 * rows.norm(dim=1).mean()


@pytest.mark.parametrize("make", [jd.upgrad, jd.dualproj, jd.mgda])
def test_a_narrow_gramian_keeps_the_guarantee(make):
    for seed in range(40):
        rows = nearly_balanced(5, seed).float()
        weights, _ = make().weighting(rows @ rows.mT)
        direction = rows.double().mT @ weights.double()
        lowest = (rows.double() @ direction).min() / rows.double().square().sum(1).max()
        assert lowest >= -BOUNDS[torch.float32]


@both_dtypes
def test_four_balanced_rows(dtype):
    direction = jd.upgrad()(BALANCED.to(dtype))[0].double()
    assert direction.norm() <= BALANCED.norm(dim=1).mean()
    assert (BALANCED @ direction).min() >= -1e-5


@both_dtypes
@pytest.mark.parametrize("c", [0.5, 1.0, 1.5])
def test_cagrad_is_in_its_ball_and_optimal_near_balance(c, dtype):
    examples = [*OUTSIDE, *(nearly_balanced(3 + seed % 5, seed) for seed in range(30))]
    for example in examples:
        jac = example.to(dtype)
        rows = jac.double()
        mean, size = rows.mean(0), rows.square().sum(1).max()
        direction = jd.cagrad(c)(jac)[0].double()
        radius = c * mean.norm()
        assert (direction - mean).norm() <= radius + 1e-7 * rows.norm(dim=1).max()
        assert (rows @ direction).min() >= best_improvement(rows, mean, radius) - 1e-6 * size


def best_improvement(rows, mean, radius):
    """Bound what any direction of the ball can do, by the dual `w'Gb + radius |J'w|`."""
    lengths = 10.0 ** torch.linspace(-9, 0, 60, dtype=torch.float64) * rows.norm(dim=1).max()
    shifted = rows + (lengths / radius)[:, None, None] * mean
    weights = jd.linalg.min_norm_point(shifted @ shifted.mT).value
    points = weights @ rows
    tight = points @ mean + radius * points.norm(dim=1)
    return tight.nan_to_num(torch.inf).min() - 2e-2 * abs(tight.nan_to_num(torch.inf).min())


def test_cagrad_where_a_cone_program_was_solved():
    want = torch.tensor([5.3e-7, 5.333e-4, -1.3333e-3, 1.0667e-3])
    torch.testing.assert_close(jd.cagrad(1.0)(OUTSIDE[1])[0], want, rtol=1e-3, atol=1e-7)
    assert (OUTSIDE[2] @ jd.cagrad(0.5)(OUTSIDE[2])[0]).min() > -1e-5
    assert (OUTSIDE[0] @ jd.cagrad(0.5)(OUTSIDE[0])[0]).min() > -1e-5


@pytest.mark.parametrize("power", [-37, -30, -23, 20, 30])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].degree is not None])
def test_every_scale_of_float32_rows(name, power):
    method = METHODS[name]
    m = max(3, method.min_m)
    jac = matrix("gaussian", m, 5, seed=11)
    got = run(method, (jac * 10.0**power).float(), m).double()
    want = run(method, jac, m)
    torch.testing.assert_close(got * 10.0 ** (-power * method.degree), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_rows_whose_squares_underflow_are_numbers(name):
    method = METHODS[name]
    m = max(4, method.min_m)
    for power in (-155, -160, -162, -170):
        for count in (1, 2, m):
            jac = matrix("gaussian", m, 5, seed=11)
            jac[:count] *= 10.0**power
            assert run(method, jac, m).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_many_scales_in_one_matrix_are_numbers(name):
    method = METHODS[name]
    m = max(4, method.min_m)
    scales = 10.0 ** torch.tensor([12.0 * (i % 3 - 1) for i in range(m)])[:, None]
    for dtype in (torch.float64, torch.float32):
        jac = (matrix("gaussian", m, 5, seed=11) * scales).to(dtype)
        got = run(method, jac, m)
        assert got.isfinite().all()
        if method.non_conflicting:
            assert conflict(jac.double(), got.double()) >= -1e-6


def test_autocast_changes_nothing():
    jac = torch.tensor([[300.0, 0.0], [-300.0, 300.0]])
    for make in (jd.upgrad, jd.mean, jd.mgda, jd.cagrad, jd.config, jd.nash_mtl):
        want = make()(jac)[0]
        for narrow in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", narrow):
                assert torch.equal(make()(jac)[0], want)
    assert torch.equal(jd.upgrad()(jac)[0], torch.tensor([75.0, 225.0]))


@pytest.mark.parametrize(
    "make", [jd.config, lambda: jd.imtl_g(safe=True), jd.nash_mtl, jd.fairgrad]
)
def test_opposed_rows_keep_their_digits_in_float32(make):
    for seed in range(40):
        row = matrix("gaussian", 1, 1000, seed=seed)
        noise = 1e-3 * matrix("gaussian", 3, 1000, seed=seed + 100)
        jac = torch.cat([row, -row, row]) + noise
        got = make()(jac.float())[0].double()
        cosines = (jac @ got) / (jac.norm(dim=1) * got.norm())
        assert cosines.min() > 1e-5


def test_repeated_eigenvalues_have_a_derivative():
    rows = torch.linalg.qr(matrix("gaussian", 5, 3).contiguous())[0].mT.contiguous()
    for scale in ("min", "median", "rmse"):
        rule = jd.aligned_mtl([0.5, 0.3, 0.2], scale)
        assert torch.func.jacrev(lambda jac, rule=rule: rule(jac)[0])(rows).isfinite().all()
    assert torch.autograd.gradcheck(
        lambda jac: jd.aligned_mtl([0.5, 0.3, 0.2], "rmse")(jac)[0], (rows.requires_grad_(),)
    )


def test_a_zero_row_has_a_derivative():
    jac = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    assert torch.func.jacrev(lambda jac: jd.mgda("l2")(jac)[0])(jac).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_no_rows_are_refused(name):
    aggregator = METHODS[name].make(max(3, METHODS[name].min_m))
    with pytest.raises(ValueError, match="must have a row"):
        aggregator(torch.zeros(0, 3))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].weighted])
def test_gramians_of_no_rows_are_refused(name):
    rule = METHODS[name].make(max(3, METHODS[name].min_m)).weighting
    if rule is not None:
        with pytest.raises(ValueError, match="m > 0"):
            rule(torch.zeros(0, 0))


def balanced(m: int, n: int, seed: int) -> torch.Tensor:
    """Draw rows whose sum is zero but for rounding."""
    rows = (jd.random.bits(jd.random.key(seed), (m - 1, n)) % 7 - 3).double() / 1e4
    return torch.cat([rows, -rows.sum(0, keepdim=True)])


@both_dtypes
@pytest.mark.parametrize("name", METHODS)
def test_rows_that_balance_but_for_rounding_give_numbers(name, dtype):
    method = METHODS[name]
    for m, n in ((max(6, method.min_m), 3), (14, 1), (12, 6)):
        for seed in range(3):
            assert run(method, balanced(m, n, seed).to(dtype), m).isfinite().all()
