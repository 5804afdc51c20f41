"""Keys: published test vectors, and the same bits eager, vmapped and compiled."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from tests.helpers import compiled
from torchjd_func import _host, _threefry

# Random123, kat_vectors: threefry2x32, 20 rounds: (counter, key, result).
KNOWN = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]
DRAWS = {
    "bits": lambda key: jd.random.bits(key, (3, 5)),
    "uniform": lambda key: jd.random.uniform(key, (7,)),
    "uniform64": lambda key: jd.random.uniform(key, (7,), dtype=torch.float64),
    "permutation": lambda key: jd.random.permutation(key, 9),
    "split": lambda key: jd.random.split(key, 3),
    "fold_in": lambda key: jd.random.fold_in(key, 5),
    "normal": lambda key: jd.random.normal(key, (6,), dtype=torch.float64),
}
any_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_published_vectors(counter, key, want):
    for word in (int, torch.tensor):
        got = _threefry.rounds([word(part) for part in key], word(counter[0]), word(counter[1]))
        assert (int(got[0]), int(got[1])) == want


@pytest.mark.parametrize("n", [1, 2, 7, _threefry.FEW, _threefry.FEW + 1, 2 * _threefry.BLOCK + 3])
def test_numpy_and_torch_draw_the_same_words(n):
    key = jd.random.key(2**40 + 3)
    words = torch.from_numpy(_threefry.encrypt(key, 1, n))
    assert torch.equal(words, vmap(lambda key: _threefry.encrypt(key, 1, n))(key[None])[0])


@any_draw
def test_vmapped_equals_loop(draw):
    keys = jd.random.split(jd.random.key(3), 4)
    assert torch.equal(vmap(draw)(keys), torch.stack([draw(key) for key in keys]))


@any_draw
def test_compiled_equals_eager(draw):
    fast, counter = compiled(draw)
    for key in jd.random.split(jd.random.key(3), 3):
        assert torch.equal(fast(key), draw(key))
    assert counter.graphs == 1


def test_inductor_draws_the_same_bits():
    torch._dynamo.reset()
    key = jd.random.key(11)
    for name in ("bits", "uniform", "uniform64", "permutation", "split", "fold_in"):
        fast = torch.compile(DRAWS[name], fullgraph=True)
        assert torch.equal(fast(key), DRAWS[name](key)), name


def test_inductor_draws_the_same_normals_up_to_rounding():
    torch._dynamo.reset()
    fast = torch.compile(DRAWS["normal"], fullgraph=True)
    torch.testing.assert_close(fast(jd.random.key(1)), DRAWS["normal"](jd.random.key(1)))


def test_keys_are_distinct_and_reproducible():
    root = jd.random.key(0)
    made = torch.cat([root[None], jd.random.split(root, 50), jd.random.fold_in(root, 1)[None]])
    assert len({tuple(key.tolist()) for key in made}) == 52
    assert torch.equal(jd.random.split(root, 50), jd.random.split(jd.random.key(0), 50))
    assert torch.equal(jd.random.split(root, 50)[:3], jd.random.split(root, 3))


def test_seeds_of_64_bits_and_tensors():
    assert jd.random.key(2**40 + 3).tolist() == [2**8, 3]
    assert torch.equal(jd.random.key(torch.tensor(2**40 + 3)), jd.random.key(2**40 + 3))
    assert jd.random.key(-1).tolist() == [0xFFFFFFFF, 0xFFFFFFFF]


def test_moments():
    n = 40_000
    uniform = jd.random.uniform(jd.random.key(0), (n,), dtype=torch.float64)
    normal = jd.random.normal(jd.random.key(1), (n,), dtype=torch.float64)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 / (12 * n) ** 0.5
    assert abs(uniform.var() - 1 / 12) < 0.002
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(normal.pow(4).mean() - 3) < 0.3


def test_bits_are_balanced_and_uncorrelated():
    drawn = jd.random.bits(jd.random.key(5), (20_000,))
    planes = torch.stack([(drawn >> k) & 1 for k in range(32)]).double()
    assert (planes.mean(1) - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5
    assert (torch.corrcoef(planes) - torch.eye(32)).abs().max() < 0.05


def test_permutations_are_uniform():
    keys = jd.random.split(jd.random.key(2), 6000)
    drawn = vmap(lambda key: jd.random.permutation(key, 3))(keys)
    _, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25  # chi-squared with 5 degrees of freedom


def test_shapes():
    for shape in ((), (0,), (1,), (2, 0, 3), (5, 7)):
        assert jd.random.bits(jd.random.key(0), shape).shape == shape
        assert jd.random.normal(jd.random.key(0), shape, dtype=torch.bfloat16).shape == shape


@pytest.mark.parametrize("n", [1, 5, _threefry.FEW - 1, _threefry.FEW, _threefry.FEW + 1])
def test_a_step_is_a_key_and_a_draw_of_other_counters(n):
    key = jd.random.key(3)
    next_key, words = _threefry.step(key, n, 52)
    assert torch.equal(next_key, jd.random.split(key, 1)[0])
    assert torch.equal(_host.tensor(words), _host.tensor(_threefry.wide_bits(key, (n,), 52)))
    mapped = torch.func.vmap(lambda key: _threefry.step(key, n, 52))(key.expand(2, 2))
    assert torch.equal(mapped[0][1], next_key)
    assert torch.equal(mapped[1][1], _host.tensor(words))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uniform_numbers_of_any_dtype_are_below_one(dtype):
    draws = jd.random.uniform(jd.random.key(3), (100_000,), dtype=dtype)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.double().mean() - 0.5) < torch.finfo(dtype).eps + 5e-3
