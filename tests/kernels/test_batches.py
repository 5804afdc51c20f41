"""Each problem of a batch is solved as if alone, whatever the strides, at the edges of padding."""

import pytest
import torch

import torchjd_func as jd
from tests.matrices import matrix

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels import cagrad, eigh, orthant, quadratic, surgery, systems, threefry
from torchjd_func.aggregation._orders import shuffled_others

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float64
K = 2  # problems


def numbers(*shape):
    """Return positive numbers."""
    return torch.rand(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(0)) + 0.5


def gramians(m):
    """Return Gramians."""
    jacs = torch.stack([matrix("gaussian", m, m + 2, seed) for seed in range(K)])
    return jacs @ jacs.mT


def orders(m):
    """Return the order of the others, for each row of each problem."""
    return torch.stack([torch.as_tensor(shuffled_others(jd.random.key(i), m)) for i in range(K)])


def search(*arrays):
    """Search with the options of the host."""
    options = {"ridge": 1e-11, "tol": 1e-8, "steps": 60, "shortest": 1e-6, "length_tol": 1e-9}
    return (cagrad.search_kernel(*arrays, **options),)


def flat(result):
    """Return results, one for each problem, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


# What is called, and with which arrays `(K, ...)` for `m` rows
TABLE = {
    "quadratic": (
        lambda G, q: quadratic.solve_kernel(G, q, 1e-11, 1e-10),
        lambda m: (gramians(m), gramians(m)[:, 0] - 1),
    ),
    "cagrad": (
        search,
        lambda m: (gramians(m), torch.full((K, m), 1 / m), gramians(m).mean(1), numbers(K)),
    ),
    "pcgrad": (surgery.project_kernel, lambda m: (gramians(m), orders(m))),
    "gradvac": (
        lambda G, targets, orders: surgery.raise_kernel(G, targets, orders, 1e-14),
        lambda m: (gramians(m), numbers(K, m, m) - 1, orders(m)),
    ),
    "eigh": (eigh.eigh_kernel, lambda m: (gramians(m),)),
    "inverse": (systems.inverse_kernel, lambda m: (gramians(m),)),
    "roots": (
        lambda G, power, shares: orthant.root_kernel(G, power, shares, 1e-12, 30),
        lambda m: (gramians(m), numbers(K), numbers(K, m)),
    ),
    "bits": (
        lambda keys: threefry.encrypt_kernel(keys, 1, 300, 53),
        lambda m: (torch.stack([jd.random.key(i) for i in range(K)]),),
    ),
}


def strided(x):
    """Return the same numbers with others between them."""
    return torch.stack([x, x + 1], -1)[..., 0]


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("name", TABLE)
def test_each_problem_is_solved_as_if_alone(name, m):
    solve, arguments = TABLE[name]
    arrays = [
        x.to(DTYPE).to(DEVICE) if x.is_floating_point() else x.to(DEVICE) for x in arguments(m)
    ]
    alone = [flat(solve(*(x[i : i + 1] for x in arrays))) for i in range(K)]
    want = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    got = flat(solve(*(strided(x) for x in arrays)))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
