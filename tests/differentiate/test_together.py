"""Leaves that share a product on a device; they do so on every device."""

import pytest
import torch

import torchjd_func as jd
from torchjd_func.differentiate._layerwise import _forms, _layers, _together
from torchjd_func.differentiate._layerwise._forms import Dense, Lookup, Outer
from torchjd_func.differentiate._layerwise._together import Pair, join

DTYPE = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


def numbers(*shape, dtype=DTYPE):
    return torch.randn(*shape, dtype=dtype, generator=GENERATOR)


def outer(e, t, g, q, p, shared=False):
    return Outer(numbers(e, t, g, q), numbers(1 if shared else e, t, g, p), (g * q, p))


def lookup():
    return Lookup(torch.randint(7, (4, 3), generator=GENERATOR), numbers(4, 3, 2), (7, 2))


TABLE = {  # how to make the rows of one leaf, and how many products three such leaves take
    "rows": (lambda: Dense(numbers(4, 3, 2)), 1),
    "numbers": (lambda: Dense(numbers(4)), 1),
    "complex": (lambda: Dense(numbers(4, 3, dtype=torch.complex128)), 1),
    "factors": (lambda: outer(4, 1, 1, 3, 2), 1),
    "positions": (lambda: outer(4, 5, 1, 3, 2), 1),
    "groups": (lambda: outer(4, 5, 2, 3, 2), 1),
    "large": (lambda: outer(2, 1, 1, 800, 800), 1),
    "shared": (lambda: outer(4, 5, 1, 3, 2, shared=True), 1),
    "lookups": (lookup, 3),
}


def products(pairs):
    """Return the sum of the products of rows."""
    return sum(_forms.cross(a, b).to(dtype) for a, b, dtype in pairs)


@pytest.mark.parametrize("twice", [True, False], ids=["twice", "apart"])
@pytest.mark.parametrize("name", TABLE)
def test_the_sum_of_products_is_the_same(name, twice):
    make, count = TABLE[name]
    firsts = [make() for _ in range(3)]
    pairs = [Pair(form, form if twice else make(), DTYPE) for form in firsts]
    joined = list(join(pairs))
    assert len(joined) == count
    assert all((pair.first is pair.second) is twice for pair in joined)
    torch.testing.assert_close(products(joined), products(pairs), rtol=1e-12, atol=1e-12)


def test_what_differs_is_multiplied_apart():
    narrow = Dense(numbers(4, 3, dtype=torch.bfloat16))
    forms = [outer(4, 1, 1, 3, 2), outer(4, 1, 1, 2, 3), Dense(numbers(4, 3)), narrow, lookup()]
    pairs = [Pair(form, form, DTYPE) for form in forms]
    joined = list(join(pairs * 2))
    assert len(joined) == len(forms) + 1
    torch.testing.assert_close(products(joined), 2 * products(pairs), rtol=1e-12, atol=1e-12)


def test_only_small_leaves_are_copied_and_few_are_held(monkeypatch):
    forms = [Dense(numbers(4, 3)) for _ in range(6)] + [Dense(numbers(4, 30))]
    pairs = [Pair(form, form, DTYPE) for form in forms]
    monkeypatch.setattr(_together, "SMALL", 100)
    monkeypatch.setattr(_together, "MOST", 24)
    joined = list(join(pairs))
    assert sorted(_forms.sizes(pair.first)[-1] for pair in joined) == [6, 6, 6, 30]
    torch.testing.assert_close(products(joined), products(pairs), rtol=1e-12, atol=1e-12)


def network(params, x):
    """Return losses of a deep network, one for each example."""
    for weight, bias in params["layers"]:
        x = (x @ weight + bias).tanh() * params["scale"]
    return x.square().sum(-1)


def setting():
    """Return parameters and a batch."""
    layers = [(numbers(4, 4), numbers(4)) for _ in range(5)]
    return {"layers": layers, "scale": numbers(4)}, numbers(6, 4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gramians_of_objectives_are_the_same(compiled, monkeypatch):
    params, x = setting()
    gramian = jd.gramian(jd.instancewise(network))
    want = gramian(params, x)
    monkeypatch.setattr(_layers, "together", lambda pairs, like: join(pairs))
    fast = torch.compile(gramian, fullgraph=True, backend="aot_eager") if compiled else gramian
    torch.testing.assert_close(fast(params, x), want, rtol=1e-12, atol=1e-12)


def test_a_cross_gramian_is_the_same(monkeypatch):
    params, x = setting()
    cross = jd.cross_gramian(jd.instancewise(network))
    want = cross(params, (x,), (2 * x,))
    monkeypatch.setattr(_layers, "together", lambda pairs, like: join(pairs))
    torch.testing.assert_close(cross(params, (x,), (2 * x,)), want, rtol=1e-12, atol=1e-12)
