"""Rows from factors in half precision, as a device makes them; here without one."""

import pytest
import torch

import torchjd_func as jd
from tests.launches import counted
from torchjd_func.differentiate._layerwise import _half
from torchjd_func.differentiate._layerwise._forms import Outer, cross

GENERATOR = torch.Generator().manual_seed(0)
HALF = (torch.bfloat16, torch.float16)


def form(e, t, g, q, p, dtype, shared=False):
    left = torch.randn(e, t, g, q, generator=GENERATOR).to(dtype)
    right = torch.randn(1 if shared else e, t, g, p, generator=GENERATOR).to(dtype)
    return Outer(left, right, (g * q, p))


@pytest.fixture
def products(monkeypatch):
    """Do as on a device; return the dtypes that tensor cores multiplied."""
    found = []

    def multiply(a, b):
        found.append(a.dtype)
        return a.float() @ b.float()

    monkeypatch.setattr(_half, "is_half", lambda left, right: left.dtype == right.dtype in HALF)
    monkeypatch.setattr(_half, "on_tensor_cores", multiply)
    return found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "sizes", [(3, 40, 1, 3, 2), (3, 40, 2, 3, 2), (1, 40, 1, 3, 2), (3, 40, 1, 3, 2, True)]
)
def test_products_are_those_of_wide_factors(sizes, dtype, products):
    half = form(*sizes[:5], dtype=dtype, shared=len(sizes) > 5)
    wide = half._replace(left=half.left.double(), right=half.right.double())
    got = cross(half, half)
    assert got.dtype == torch.float32 and products == [dtype]
    torch.testing.assert_close(got.double(), cross(wide, wide), rtol=1e-5, atol=1e-3)


def losses(params, x):
    return ((x @ params["first"]).tanh() @ params["last"]).square().sum((1, 2))


PARAMS = {
    "first": torch.randn(5, 4, generator=GENERATOR),
    "last": torch.randn(4, 2, generator=GENERATOR),
}
X = torch.randn(3, 60, 5, generator=GENERATOR)
GRAMIAN = jd.gramian(jd.cast_floating(jd.instancewise(losses), torch.bfloat16))


def test_gramians_are_the_same(products):
    want = jd.gramian(jd.instancewise(losses))(PARAMS, X)
    got = GRAMIAN(PARAMS, X)
    assert torch.bfloat16 in products
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.max().item())


def slope(params, x):
    return torch.func.grad(lambda params: GRAMIAN(params, x).square().mean())(params)


def mapped(params, x):
    batch = {name: torch.stack([value, 2 * value]) for name, value in params.items()}
    return torch.func.vmap(lambda params: GRAMIAN(params, x))(batch)


def pushed(params, x):
    return torch.func.jvp(lambda params: GRAMIAN(params, x), (params,), (params,))


def compiled(params, x):
    return torch.compile(GRAMIAN, fullgraph=True, backend="aot_eager")(params, x)


@pytest.mark.parametrize("through", [slope, mapped, pushed, compiled])
def test_what_is_watched_is_cast_up(through, request):
    GRAMIAN(PARAMS, X)  # makes a plan
    want = through(PARAMS, X)
    torch.compiler.reset()
    products = request.getfixturevalue("products")
    got = through(PARAMS, X)
    assert not products
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_is_cast_up_on_a_device():
    with counted() as counter:
        left, right = (torch.empty(8, 32, 1, 16, device="cuda", dtype=HALF[0]) for _ in range(2))
        half = Outer(left, right, (16, 16))
        assert cross(half, half).dtype == torch.float32
    assert counter.names == ["bmm", "mm"]
