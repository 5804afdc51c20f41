"""Golden numbers and oracles of EPO, PMGDA and their linear program."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import compiled
from tests.matrices import A, B, matrix
from tests.values import close, direction_of, weights_of


@pytest.mark.parametrize(
    ("jac", "losses", "weights", "direction"),
    [
        (A, [1.0, 2.0], [0.21497886, 0.78502114], [3.85021137, 1.0, 1.0]),
        (A, [2.0, 1.0], [1.0, 0.0], [-4.0, 1.0, 1.0]),
        (B, [1.0, 2.0, 3.0], [0.0, 0.16910896, 0.83089104], None),
        (B, [1.0, 1.0, 1.0], [0.4, 0.2, 0.4], [0.0, 0.0, 1.2]),
    ],
)
def test_epo_values(jac, losses, weights, direction):
    aggregator = jd.epo([1.0] * len(jac))
    close(weights_of(aggregator, jac, losses), weights, 8)
    if direction is not None:
        close(direction_of(aggregator, jac, losses), direction, 8)


def test_epo_edge_cases():
    close(weights_of(jd.epo([1.0, 2.0]), A, [0.0, 0.0]), [0.5, 0.5])
    assert weights_of(jd.epo([1.0, 2.0]), A, [0.0, 1.0]).isfinite().all()
    close(weights_of(jd.epo([2.0]), A[:1], [3.0]), [1.0])


def epo_oracle(jac: Tensor, losses: np.ndarray, preference: np.ndarray) -> np.ndarray | None:
    """Solve the balancing program of EPO with a general solver, from its text."""
    gramian = (jac @ jac.mT).numpy()
    scaled = preference * losses
    share = scaled / scaled.sum()
    uneven = (share * np.log(len(share) * share)).sum()
    assert uneven > 1e-4
    change = gramian @ (preference * (np.log(len(share) * share) - uneven))
    limits = np.zeros(len(share))
    if (change > 0).any():
        limits = np.where(change > 0, -1e9, change)
        limits[scaled.argmax()] = 0
    found = linprog(-change, -gramian, -limits, np.ones((1, len(share))), [1.0])
    return found.x if found.success else None


@pytest.mark.parametrize("m", [2, 3, 4, 5, 7])
def test_epo_agrees_with_a_general_solver(m):
    infeasible = 0
    for seed in range(15):
        jac = matrix("gaussian", m, 4, seed=seed)
        losses = jd.random.uniform(jd.random.key(seed), (m,)).double() + 0.1
        preference = torch.linspace(1, 2, m, dtype=torch.float64)
        got = weights_of(jd.epo(preference), jac, losses.tolist())
        want = epo_oracle(jac, losses.numpy(), preference.numpy())
        infeasible += want is None
        inverse = 1 / preference
        close(got, inverse / inverse.sum() if want is None else want, 6)
    assert infeasible < 15


def test_epo_restricts_the_imbalance_when_descending():
    losses = torch.tensor([1.0, 1.0002, 0.9999], dtype=torch.float64)
    differs = False
    for seed in range(20):
        gramian = (jac := matrix("gaussian", 3, 4, seed=seed)) @ jac.mT
        share = losses / losses.sum()
        uneven = (share * (3 * share).log()).sum()
        change = gramian @ ((3 * share).log() - uneven)
        tight = weights_of(jd.epo([1.0] * 3), jac, losses.tolist())
        loose = weights_of(jd.epo([1.0] * 3, restricted=False), jac, losses.tolist())
        assert (gramian @ loose >= -1e-9).all()
        assert tight @ change >= min(0.0, float(change.max())) - 1e-9
        assert (gramian @ loose).sum() >= (gramian @ tight).sum() - 1e-9
        differs = differs or not torch.allclose(tight, loose, atol=1e-6)
    assert differs


def test_pmgda_values():
    close(weights_of(jd.pmgda([1.0, 1.0]), A, [1.0, 2.0]), [0.10742731, 0.08828487], 8)
    close(direction_of(jd.pmgda([1.0, 1.0]), A, [1.0, 2.0]), [0.1, 0.19571219, 0.19571219], 8)
    predicted = direction_of(jd.pmgda([1.0, 1.0], h_tol=1.0), A, [1.0, 2.0])
    close(predicted, [0.0, 1.0, 1.0], 8)
    weights = weights_of(jd.pmgda([1.0] * 3), B, [1.0, 2.0, 3.0])
    close(weights, [0.37593739, 0.12254976, 0.11426167], 8)
    direction = direction_of(jd.pmgda([1.0] * 3), B, [1.0, 2.0, 3.0])
    close(direction, [0.26167572, 0.13083786, 0.34278501], 8)


def pmgda_oracle(jac: Tensor, losses: np.ndarray, preference: np.ndarray, sigma: float):
    """Solve the correction of PMGDA on explicit rows with a general solver."""
    matrix_, m = jac.numpy(), len(jac)
    ray = preference / np.linalg.norm(preference)
    across = losses - (losses @ ray) * ray
    along = matrix_.T @ (across / np.linalg.norm(across))
    unit = np.stack([g / np.linalg.norm(g) for g in [*matrix_, along]])
    gains = np.hstack([-matrix_ @ unit.T, np.ones((m, 1))])
    rate = np.hstack([-along @ unit.T, 0.0])[None]
    found = linprog(
        np.eye(m + 2)[-1] * -1,
        np.vstack([gains, rate]),
        np.append(np.zeros(m), -sigma * np.linalg.norm(along)),
        np.append(np.ones(m + 1), 0.0)[None],
        [1.0],
        bounds=[(0, None)] * (m + 1) + [(None, None)],
    )
    return found.x[:-1] @ unit


@pytest.mark.parametrize("m", [2, 3, 4, 5, 7])
def test_pmgda_agrees_with_a_general_solver(m):
    for seed in range(15):
        jac = matrix("gaussian", m, m + 2, seed=seed)
        losses = jd.random.uniform(jd.random.key(seed), (m,)).double() + 0.1
        preference = torch.linspace(1, 2, m, dtype=torch.float64)
        got = direction_of(jd.pmgda(preference, sigma=0.3), jac, losses.tolist())
        close(got, pmgda_oracle(jac, losses.numpy(), preference.numpy(), 0.3), 6)


def test_pmgda_predicts_along_the_ray():
    losses = [1.0, 1.5, 2.0]
    jac = matrix("gaussian", 3, 5, seed=1)
    direction = direction_of(jd.pmgda([1.0] * 3, h_tol=10.0), jac, losses)
    values = torch.tensor(losses, dtype=torch.float64)
    along = jac.mT @ (values - values.mean())
    assert abs(float(direction @ along)) < 1e-9
    on_the_ray = direction_of(jd.pmgda([1.0, 1.5, 2.0]), jac, losses)
    close(on_the_ray, jd.mgda()(jac)[0], 9)


def test_pmgda_stops_where_gradients_are_opposite_to_rounding():
    key, other, third = jd.random.split(jd.random.key(0), 3)
    lengths = jd.random.uniform(key, (500, 2, 1), dtype=torch.float64)
    lines = jd.random.normal(other, (500, 1, 10), dtype=torch.float64)
    jacs = lengths * torch.tensor([[1.0], [-1.0]]) * lines
    losses = jd.random.uniform(third, (500, 2), dtype=torch.float64)

    def direction(jac: Tensor, losses: Tensor) -> Tensor:
        return jd.pmgda(losses + 1e-4)(jac, losses=losses)[0]

    fast, _ = compiled(vmap(direction))
    for run in (vmap(direction), fast):
        assert run(jacs, losses).abs().max() < 1e-12


def test_pmgda_scales_by_its_mode():
    losses = [1.0, 2.0, 3.0]
    correct, predict = jd.pmgda([1.0] * 3), jd.pmgda([1.0] * 3, h_tol=10.0)
    for scale in (1e-6, 1e6):
        close(direction_of(correct, scale * B, losses), direction_of(correct, B, losses), 8)
        want = direction_of(predict, B, losses)
        close(direction_of(predict, scale * B, losses) / scale, want, 8)


@pytest.mark.parametrize("factory", [jd.epo, jd.pmgda])
@pytest.mark.parametrize("m", [3, 6])
def test_preference_methods_map_and_compile_on_both_routes(factory, m):
    batch = torch.stack([matrix("gaussian", m, m + 2, seed) for seed in range(4)])
    losses = torch.linspace(0.5, 2.0, m, dtype=torch.float64)
    preferences = torch.stack([torch.linspace(1, k, m, dtype=torch.float64) for k in range(1, 5)])

    def direct(jac, preference):
        return factory(preference)(jac, losses=losses)[0]

    want = torch.stack([direct(*pair) for pair in zip(batch, preferences, strict=True)])
    close(vmap(direct)(batch, preferences), want, 9)
    fast, counter = compiled(direct)
    for jac, preference, expected in zip(batch, preferences, want, strict=True):
        close(fast(jac, preference), expected, 9)
    assert counter.graphs == 1


def random_program(seed: int, m: int, n_free: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `max c'x`, `R w - t >= limit`, `w` on the simplex, in standard form."""
    keys = jd.random.split(jd.random.key(seed), 3)
    ratios = jd.random.normal(keys[0], (m, m), dtype=torch.float64)
    limits = 0.3 * jd.random.normal(keys[1], (m,), dtype=torch.float64) - 0.2
    if seed % 3 == 0:  # degenerate vertices
        ratios, limits = ratios.round(), torch.zeros(m, dtype=torch.float64)
    rest = torch.cat([-torch.eye(m), torch.zeros(1, m)]).double()
    free = torch.cat([-torch.ones(m, n_free), torch.zeros(1, n_free)]).double()
    matrix_ = torch.cat([torch.cat([ratios, torch.ones(1, m).double()]), rest, free], dim=-1)
    c = jd.random.normal(keys[2], (2 * m + n_free,), dtype=torch.float64)
    c = torch.cat([c[:m] * (1 - n_free), 0 * c[m : 2 * m], torch.ones(n_free).double()])
    return c, matrix_, torch.cat([limits, torch.ones(1).double()])


@pytest.mark.parametrize("n_free", [0, 1])
def test_linear_program_agrees_with_a_general_solver(n_free):
    outcomes = set()
    for seed in range(60):
        m = 2 + seed % 4
        c, a, b = random_program(seed, m, n_free)
        bounds = [(0, None)] * (2 * m) + [(None, None)] * n_free
        want = linprog(-c.numpy(), A_eq=a.numpy(), b_eq=b.numpy(), bounds=bounds)
        got = jd.linalg.linear_program(c, a, b, n_free=n_free)
        outcomes.add(want.success)
        assert bool(got.converged) == want.success
        if want.success:
            close(c @ got.value, -want.fun, 9)
            close(a @ got.value, b, 9)
            assert (got.value[: 2 * m] >= 0).all()
        else:
            assert torch.equal(got.value, torch.zeros_like(c))
    assert True in outcomes


@pytest.mark.parametrize("n_free", [0, 1])
def test_linear_programs_of_a_batch_are_solved_as_each_alone(n_free):
    programs = [random_program(seed, 4, n_free) for seed in range(40)]
    c, a, b = (torch.stack(parts) for parts in zip(*programs, strict=True))
    a[7, 0, 0], b[11, 1], c[13, 0] = torch.nan, torch.inf, torch.nan
    together = jd.linalg.linear_program(c, a, b, n_free=n_free)
    assert not together.converged[[7, 11]].any() and not together.value[[7, 11]].any()
    for i in set(range(40)) - {7, 11, 13}:
        alone = jd.linalg.linear_program(*programs[i], n_free=n_free)
        assert together.converged[i] == alone.converged
        close(together.value[i], alone.value, 9)


def test_linear_program_is_differentiable_at_a_vertex():
    c, a, b = random_program(1, 3, 0)
    inputs = (a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: jd.linalg.linear_program(c, a, b).value, inputs)


def test_linear_program_is_large_enough_for_twenty_unknowns():
    c, a, b = random_program(1, 20, 0)
    want = linprog(-c.numpy(), A_eq=a.numpy(), b_eq=b.numpy())
    close(c @ jd.linalg.linear_program(c, a, b).value, -want.fun, 9)
