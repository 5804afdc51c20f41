"""A plan that was made where rows are right by coincidence is not wrong on the next batch."""

import enum
import warnings

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F

import torchjd_func as jd
from tests.differentiate.test_layerwise_kinds import AXES, over, rand, total
from tests.programs import Doubled, by_loops

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


def sorted_by(order, back):
    """Return losses whose examples are put in an order of the data, and back."""
    return lambda p, x, i: total(back(F.linear(order(x, i), p[0]).tanh(), i))


def permute(x, i):
    """Return examples in an order."""
    return x[i.argsort()]


def each(m):
    """Return the example of each entry that a mask takes."""
    return torch.nonzero(m)[:, 0]


def kept(p, x, m):
    """Return losses of the entries that a mask takes."""
    losses = F.linear(x[m], p[0]).tanh().sum(1)
    return torch.zeros(len(x), dtype=x.dtype).index_add(0, each(m), losses)


def written(p, x, m):
    """Write to the entries that a mask takes."""
    h = torch.zeros_like(x)
    h[m] = F.linear(x[m], p[0]).tanh()
    return total(h)


class Permuted(torch.autograd.Function):
    """Puts examples in an order where nobody sees it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, order):
        return x[order]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, *grads):
        return grads[0][ctx.saved_tensors[0].argsort()], None


SORTED = {
    "an index": sorted_by(lambda x, i: x[i], permute),
    "a list": sorted_by(lambda x, i: x[i.tolist()], permute),
    "index_select": sorted_by(lambda x, i: x.index_select(0, i), permute),
    "gather": sorted_by(lambda x, i: x.gather(0, i[:, None].expand_as(x)), permute),
    "take_along_dim": sorted_by(lambda x, i: torch.take_along_dim(x, i[:, None], 0), permute),
    "index_add": sorted_by(lambda x, i: torch.zeros_like(x).index_add(0, i, x), lambda h, i: h[i]),
    "scatter": sorted_by(
        lambda x, i: torch.zeros_like(x).scatter(0, i[:, None].expand_as(x), x), lambda h, i: h[i]
    ),
    "by a key": sorted_by(lambda x, i: x[(-i).argsort()], lambda h, i: h[(-i).argsort().argsort()]),
    "added in place": lambda p, x, i: total(
        torch.zeros_like(x).index_add_(0, i, F.linear(x[i], p[0]).tanh())
    ),
    "after a function of its own": sorted_by(lambda x, i: Doubled.apply(x)[i], permute),
    "a product": sorted_by(lambda x, i: F.one_hot(i, len(i)).to(x) @ x, permute),
    "a sum": sorted_by(
        lambda x, i: torch.einsum("ij,jk->ik", F.one_hot(i, len(i)).to(x), x), permute
    ),
    "mapped": sorted_by(lambda x, i: vmap(lambda k: x.index_select(0, k[None])[0])(i), permute),
    "a function of its own": sorted_by(lambda x, i: Permuted.apply(x, i), permute),
    "one by one": lambda p, x, i: total(
        torch.stack([h[k] for h in [F.linear(x, p[0]).tanh()] for k in i.tolist()])
    ),
    "by number": sorted_by(lambda x, i: x.roll(int(i[0]), 0), lambda h, i: h.roll(-int(i[0]), 0)),
}
MASKED = {
    "taken": kept,
    "written": written,
    "selected": lambda p, x, m: torch.zeros(len(x), dtype=x.dtype).index_add(
        0, each(m), F.linear(x.masked_select(m[..., None]).view(-1, 2), p[0]).tanh().sum(1)
    ),
}
APART = {
    "product": lambda p, x, m: total(F.linear(x, p[0]).tanh() * m[..., None]),
    "where": lambda p, x, m: total(torch.where(m[..., None], F.linear(x, p[0]).tanh(), 0)),
    "filled in place": lambda p, x, m: total(F.linear(x, p[0]).masked_fill_(m[..., None], 0.5)),
    "the last": lambda p, x, m: total(F.linear(x, p[0]).tanh()[torch.arange(len(x)), m.sum(1) - 1]),
    "classes": lambda p, x, m: (
        F.cross_entropy(F.linear(x, p[0]).flatten(0, 1), m.long().flatten(), reduction="none")
        .unflatten(0, m.shape)
        .sum(1)
    ),
    "gathered": lambda p, x, m: total(F.linear(x, p[0]).gather(2, m.long()[..., None])),
}


@pytest.mark.parametrize("name", SORTED)
def test_an_order_that_the_first_batch_does_not_have(name):
    first, then = torch.arange(4), torch.tensor([2, 0, 3, 1])
    if name == "by a key":  # all equal, as lengths of a dummy batch are
        first = torch.ones(4, dtype=torch.int64)
    for start in (rand(4, 2), torch.zeros(4, 2).double()):
        found, expected = twice(SORTED[name], (start, first), PARAMS, rand(4, 2), then)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


DRAWN = {
    "randperm": lambda n, key: torch.randperm(n),
    "rand": lambda n, key: torch.rand(n).argsort(),
    "in place": lambda n, key: torch.empty(n).uniform_().argsort(),
    "multinomial": lambda n, key: torch.multinomial(torch.ones(n), n),
    "a generator of its own": lambda n, key: torch.randperm(n, generator=generator(key)),
}


def generator(key):
    """Return a generator in a state."""
    return torch.Generator().manual_seed(key)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(
    "how",
    [lambda x, i: x[i], lambda x, i: F.one_hot(i, len(i)).to(x) @ x],
    ids=["index", "product"],
)
def test_an_order_that_is_drawn_and_sorted_at_first(name, how):
    def order(key, n=3):
        torch.manual_seed(key)
        return DRAWN[name](n, key)

    def losses(p, x, key):
        return sorted_by(lambda x, i: how(x, i), permute)(p, x, order(key, len(x)))

    unmoved = [key for key in range(100) if order(key).tolist() == [0, 1, 2]]
    moved = [key for key in range(100) if order(key).tolist() == [2, 0, 1]]
    found, expected = twice(losses, (rand(3, 2), unmoved[0]), PARAMS, rand(3, 2), moved[0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Dim(enum.IntEnum):
    """Names of axes."""

    EXAMPLES = 0
    TIME = 1
    FEATURES = 2


class Equation(enum.StrEnum):
    """Names of products."""

    PLAIN = "bti,ij->btj"
    MOVED = "bti,ij->tbj"
    KEPT = "bti->bti"
    BACK = "tbi->bti"


def rolled(p, x, k):
    """Move examples on and back."""
    return total(F.linear(x.roll(k, 0), p[0]).tanh().roll(-k, 0))


def swapped(p, x, k):
    """Move examples to another axis and back."""
    return total(F.linear(x.transpose(0, k), p[0]).tanh().transpose(0, k))


def indexed(p, x, k):
    """Sort by an array, and back."""
    i = np.argsort(k * np.arange(len(x)))
    return sorted_by(lambda x, i: x[i], lambda h, i: h[np.argsort(i)])(p, x, i)


def multiplied(p, x, equations):
    """Move examples to another axis and back."""
    there, back = equations
    return total(torch.einsum(back, torch.einsum(there, x, p[0]).tanh()))


def shifted(p, x, k):
    """Move examples on by an index."""
    return total(F.linear(x, p[0]).tanh()[(torch.arange(len(x)) + k) % len(x)])


def spaced(p, x, k):
    """Take examples from one end, or from the other."""
    return total(F.linear(x, p[0]).tanh()[torch.linspace(k, len(x) - 1 - k, len(x)).long()])


def looked_up(p, x, k):
    """Take examples in one of two orders."""
    orders = torch.arange(len(x)).repeat(2, 1)
    orders[1] = orders[1].flip(0)
    return total(F.linear(x, p[0]).tanh()[orders[k]])


def listed(p, x, k):
    """Take examples in one of two orders, one by one."""
    h = F.linear(x, p[0]).tanh()
    return total(torch.stack([h[i] for i in range(len(x))[:: 1 - 2 * k]]))


def applied(p, x, function):
    """Apply a custom function."""
    return total(function.apply(F.linear(x, p[0])).tanh())


def hooked(p, x, hook):
    """Apply a hook."""
    h = F.linear(x, p[0])
    h.register_hook(hook)
    return total(h)


def unmapped(p, x, axis):
    """Map over examples, and put these elsewhere."""
    return total(vmap(torch.tanh, out_dims=axis)(F.linear(x, p[0])))


class Kept(torch.autograd.Function):
    """Keeps an order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 1 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


class Turned(Kept):
    """Turns an order around."""

    @staticmethod
    def forward(x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].flip(0)


CONSTANTS = {
    "added to an index": (shifted, 0, 1),
    "a number that becomes an index": (spaced, 0.0, 1.0),
    "the row of an index": (looked_up, 0, 1),
    "examples one by one": (listed, 0, 1),
    "a custom function": (applied, Kept, Turned),
    "a hook": (hooked, lambda grad: 1 * grad, lambda grad: grad.flip(0)),
    "an axis that is mapped": (unmapped, 0, 1),
    "an integer of numpy": (rolled, np.int64(0), np.int64(1)),
    "an axis of numpy": (swapped, np.int32(1), np.int32(2)),
    "an enumeration": (swapped, Dim.TIME, Dim.FEATURES),
    "an enumeration of strings": (
        multiplied,
        (Equation.PLAIN, Equation.KEPT),
        (Equation.MOVED, Equation.BACK),
    ),
    "an array": (indexed, 1, -1),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_any_kind_that_change(name):
    fn, first, then = CONSTANTS[name]
    for known, value in ((first, then), (then, first)):
        found, expected = twice(fn, (rand(2, 2, 2), known), PARAMS, rand(2, 2, 2, seed=1), value)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


EVEN = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).bool()
ODD = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool()


@pytest.mark.parametrize("name", [*MASKED, *APART])
def test_masks_that_take_as_many_of_each_example_at_first(name):
    fn = (MASKED | APART)[name]
    found, expected = twice(fn, (rand(4, 3, 2), EVEN), PARAMS, rand(4, 3, 2, seed=1), ODD)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", APART)
def test_integers_that_keep_examples_apart_cost_no_rows(name):
    batch = rand(4, 3, 2), EVEN
    report = jd.explain_gramian(jd.instancewise(APART[name]), PARAMS, *batch)
    assert report.leaves[0].rule == "linear"


def test_the_operation_that_orders_examples_is_named():
    with pytest.warns(UserWarning, match="depends on data at 'index_select'"):
        report = jd.explain_gramian(
            jd.instancewise(SORTED["index_select"]), PARAMS, rand(4, 2), torch.arange(4)
        )
    assert report.leaves[0].rule == "the order of examples depends on data at index_select"


def test_a_graph_takes_rows_where_nothing_was_proven():
    tokens, labels = torch.arange(16).reshape(4, 4) % 5, torch.arange(16).reshape(4, 4) % 3
    params, scales = [rand(5, 3), rand(3, 5)], torch.zeros(2, dtype=torch.long)

    def losses(params, tokens, labels):
        return (time_first(params, tokens, labels)[:, None] * scales).sum(1)

    objective = jd.instancewise(losses)
    jd.gramian(objective)(params, tokens, labels)
    scales += 1
    step = torch.compile(jd.gramian(objective), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="compiled without a plan that was proven"):
        found = step(params, tokens, labels)
    rows = by_loops(losses, params, tokens, labels)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


def test_what_is_known_once_is_not_proven_again(monkeypatch):
    from torchjd_func.differentiate._layerwise import _proof

    proofs, failing = [], _proof.failing
    monkeypatch.setattr(_proof, "failing", lambda recorded: proofs.append(1) or failing(recorded))
    step = jd.gramian(jd.instancewise(lambda p, x: F.linear(x, p[0]).tanh().sum(1)))
    for _ in range(3):
        step(PARAMS, rand(3, 2))
    assert len(proofs) == 5


def attention(p, x):
    """Return losses of sequences, by sizes that are read of them."""
    b, t, d = x.shape
    q, k = (F.linear(x, w).view(b, t, 1, d).transpose(1, 2) for w in p)
    scores = (q @ k.mT).reshape(b, t * t)
    return (0.1 * scores).tanh().sum(1) + F.linear(x.reshape(b * t, d), p[0]).view(
        b, -1
    ).square().sum(1)


def side_by_side(p, x):
    """Return losses of sequences whose examples are side by side, which lengths of 1 hide."""
    h = F.linear(x.transpose(0, 1).reshape(-1, x.shape[-1]), p[0]).tanh()
    return h.view(x.shape[1], x.shape[0], -1).square().sum((0, 2))


def centred(p, x):
    """Return losses that depend on each other, of which one example knows nothing."""
    h = F.linear(x, p[0])
    return (h - h.mean(0)).square().sum((1, 2)) + h.sum((1, 2))


def test_other_sizes_are_not_proven_again(monkeypatch):
    from torchjd_func.differentiate._layerwise import _proof

    proofs, failing = [], _proof.failing
    monkeypatch.setattr(_proof, "failing", lambda recorded: proofs.append(1) or failing(recorded))
    params = [rand(3, 3), rand(3, 3)]
    step = jd.gramian(jd.instancewise(attention))
    for sizes in ((3, 4, 3), (3, 5, 3), (2, 5, 3), (4, 2, 3), (5, 4, 3)):
        x = rand(*sizes)
        rows = by_loops(attention, params, x)
        torch.testing.assert_close(step(params, x), rows @ rows.T, rtol=1e-10, atol=1e-12)
        assert len(proofs) == (5 if sizes[0] == 3 else 10)  # two numbers of examples


CONSTANT = {  # what mixes examples unless there are as many as a number in the code, or fewer
    "roll": lambda h: h.roll(4, 0)[:, 0] * h[:, 1],
    "tril": lambda h: torch.tril(h @ h.mT, -4).sum(1),
    "pad": lambda h: F.pad(h, (0, 0, 4, 0))[: len(h)].sum(1),
    "groups": lambda h: (
        F.pad(h, (0, 0, 0, -len(h) % 4)).unflatten(0, (-1, 4)).roll(1, 0).flatten(0, 1)[: len(h), 0]
    ),
}


@pytest.mark.filterwarnings("ignore:The Gramian of an instance-wise")
@pytest.mark.parametrize("sizes", [(4, 8, 6), (4, 6, 9), (3, 7)])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_number_of_examples_proves_nothing_of_another(name, sizes):
    def fn(p, x):
        h = F.linear(x, p[0]).tanh()
        return total(h) + 0.3 * CONSTANT[name](h)

    step, params = jd.gramian(jd.instancewise(fn)), [rand(3, 2)]
    for size in sizes:
        rows = by_loops(fn, params, rand(size, 2))
        torch.testing.assert_close(
            step(params, rand(size, 2)), rows @ rows.T, rtol=1e-10, atol=1e-12
        )


def test_keywords_have_plans_of_their_own():
    params = [rand(3, 3), rand(3, 3)]
    step = jd.gramian(jd.instancewise(attention))
    for b, t in ((3, 4), (2, 5)):
        x = rand(b, t, 3)
        rows = by_loops(attention, params, x)
        for found in (step(params, x=x), step(params, x)):
            torch.testing.assert_close(found, rows @ rows.T, rtol=1e-10, atol=1e-12)


def in_groups(p, x):
    """Return losses of attention within groups of four, whatever the lengths."""
    h = F.linear(x, p[0]).flatten(0, 1)
    group = torch.arange(len(h)) // 4
    scores = (h @ h.T).masked_fill(group[:, None] != group, -torch.inf)
    return total((scores.softmax(1) @ h).view(x.shape))


@pytest.mark.filterwarnings("ignore:The Gramian of an instance-wise")
def test_groups_of_a_size_prove_nothing_of_other_lengths():
    step, params = jd.gramian(jd.instancewise(in_groups)), [rand(3, 3)]
    for length in (4, 8, 6, 2):
        x = rand(4, length, 3)
        rows = by_loops(in_groups, params, x)
        torch.testing.assert_close(step(params, x), rows @ rows.T, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The Gramian of an instance-wise")
@pytest.mark.parametrize("fn", [attention, side_by_side, centred])
def test_sizes_of_one_prove_nothing_of_others(fn):
    step = jd.gramian(jd.instancewise(fn))
    params = [rand(3, 3), rand(3, 3)]
    for sizes in ((1, 4, 3), (3, 1, 3), (1, 1, 3), (3, 4, 3), (2, 1, 3), (2, 3, 3)):
        x = rand(*sizes)
        rows = by_loops(fn, params, x)
        torch.testing.assert_close(step(params, x), rows @ rows.T, rtol=1e-10, atol=1e-12)


MIXED = {
    "normalised": lambda p, x: total(F.normalize(F.linear(x, p[0]), dim=0)),
    "less their mean": lambda p, x: total(F.linear(x, p[0]) - F.linear(x, p[0]).mean(0)),
}
DATA = rand(4, 2)
TRANSFORMS = {
    "vmap over parameters": lambda fn: vmap(fn, (1, None))(rand(2, 3, 2), DATA),
    "vmap over data": lambda fn: vmap(fn, (None, 2))(rand(2, 2), rand(4, 2, 3)),
    "vmap twice": lambda fn: vmap(vmap(fn, (None, 0)), (0, 1))(rand(3, 2, 2), rand(2, 3, 4, 2)),
    "grad": lambda fn: grad(lambda p: fn(p, DATA).sin().sum())(rand(2, 2)),
    "jacrev": lambda fn: jacrev(lambda p: fn(p, DATA).sin())(rand(2, 2)),
    "vmap of grad": lambda fn: vmap(grad(lambda p: fn(p, DATA).sin().sum()))(rand(3, 2, 2)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_first_runs_within_transforms_prove_as_well(name, transform):
    objective = jd.instancewise(MIXED[name])

    def gramian(p, x):
        rows = jacrev(MIXED[name])([p], x)[0].flatten(1)
        return rows @ rows.T

    with pytest.warns(UserWarning, match="losses depend on other examples"):
        found = TRANSFORMS[transform](lambda p, x: jd.gramian(objective)([p], x))
    torch.testing.assert_close(found, TRANSFORMS[transform](gramian), rtol=1e-9, atol=1e-11)


def test_a_proof_counts_what_an_outer_transform_maps_over():
    def losses(p, x, shift):
        return total(F.linear(x, p) - shift * F.linear(x, p).mean(0))

    def found(shift):
        return jd.gramian(jd.instancewise(lambda p, x: losses(p, x, shift)))(weight, x)

    weight, x, shifts = rand(2, 2), rand(4, 2), torch.tensor([0.0, 1.0]).double()
    with pytest.warns(UserWarning, match="losses depend on other examples"):
        mapped = vmap(found)(shifts)
    rows = torch.stack([jacrev(losses)(weight, x, shift).flatten(1) for shift in shifts])
    torch.testing.assert_close(mapped, rows @ rows.mT, rtol=1e-9, atol=1e-11)


def scheduled(mixing):
    """Return losses with a part that a coefficient, here an argument, leaves out at first."""

    def losses(p, x, k):
        h = F.linear(x, p[0]).tanh()
        return total(h) + mixing(h, k)

    return losses


def contrast(h, k):
    """Return the similarity of an example with all others."""
    return k * (h @ h.T).exp().masked_fill(torch.eye(len(h)).bool(), 0).sum(1)


SCHEDULED = {
    "the mean": scheduled(lambda h, k: total(k * h.mean(0) * h)),
    "mixed up": lambda p, x, k: total(
        (1 - k) * F.linear(x, p[0]).tanh() + k * F.linear(x, p[0]).flip(0)
    ),
    "by name": lambda p, x, k: total(torch.add(F.linear(x, p[0]), x.roll(1, 0) @ p[0], alpha=k)),
    "a contrast": scheduled(contrast),
    "a penalty of all": scheduled(lambda h, k: k * h.norm()),
    "a tensor": scheduled(lambda h, k: torch.tensor(float(k)).to(h) * contrast(h, 1)),
    "several": scheduled(lambda h, k: torch.tensor([float(k)] * 3).to(h).sum() * contrast(h, 1)),
}
THRESHOLDS = {
    "clipped by a norm": lambda p, x: total(F.linear(x, p[0]) / F.linear(x, p[0]).norm().clamp(3)),
    "a hinge": lambda p, x: total(F.linear(x, p[0])) + F.relu(F.linear(x, p[0]).sum() - 9),
    "the less": lambda p, x: torch.minimum(total(F.linear(x, p[0])), 9 + x.mean() * p[0].sum()),
    "the less of all": lambda p, x: torch.minimum(
        total(F.linear(x, p[0])), 5 + F.linear(x, p[0]).square().mean()
    ),
    "chosen": lambda p, x: total(
        torch.where(x.norm() > 3, F.linear(x, p[0]) - F.linear(x, p[0]).mean(0), F.linear(x, p[0]))
    ),
}
COMPARED = {
    "sort": lambda p, x: total(F.linear(x, p[0]).sort(0).values.sin() * x),
    "cummax": lambda p, x: total(F.linear(x, p[0]).cummax(0).values.sin() * x),
    "topk": lambda p, x: total(F.linear(x, p[0]).topk(len(x), 0, largest=False)[0].sin() * x),
    "msort": lambda p, x: total(torch.msort(F.linear(x, p[0])).sin() * x),
    "no less than the first": lambda p, x: total(
        torch.maximum(F.linear(x, p[0]), F.linear(x, p[0])[:1]).sin() * x
    ),
    "there and back": lambda p, x: total(there_and_back(F.linear(x, p[0])) * x),
}


def there_and_back(h):
    """Sort, apply a function of the rank, and put back."""
    values, order = h.sort(0)
    return (values * torch.arange(len(h))[:, None]).gather(0, order.argsort(0))


GATES = {  # which let all examples through, or none: `(what mixes, what does not, whether)`
    "where": lambda a, b, on: torch.where(on, a, b),
    "masked_fill": lambda a, b, on: b + a.masked_fill(~on, 0),
    "in place": lambda a, b, on: b + (1 * a).masked_fill_(~on, 0),
    "product": lambda a, b, on: b + a * on,
    "float product": lambda a, b, on: b + a * on.to(a),
    "lerp": lambda a, b, on: torch.lerp(b, a, on.to(a)),
    "addcmul": lambda a, b, on: torch.addcmul(b, a, on.to(a)),
    "quotient": lambda a, b, on: b + a / (1 / on.to(a)),
    "heaviside": lambda a, b, on: b + a * torch.heaviside(on.to(a) - 0.5, a.new_zeros(())),
    "index": lambda a, b, on: torch.stack([b, a])[on.long()],
    "index_select": lambda a, b, on: torch.stack([b, a]).index_select(0, on.long()[None])[0],
    "matrix": lambda a, b, on: F.one_hot(on.long(), 2).to(a) @ torch.stack([b, a]),
    "sum": lambda a, b, on: torch.einsum(
        "k,kb->b", F.one_hot(on.long(), 2).to(a), torch.stack([b, a])
    ),
    "softshrink": lambda a, b, on: b + F.softshrink(a, 0.1 if on else 1e3),
    "hardshrink": lambda a, b, on: b + F.hardshrink(a, 0.1 if on else 1e3),
    "threshold": lambda a, b, on: b + F.threshold(a, 0.0 if on else 1e3, 0.0),
    "clamp": lambda a, b, on: b + a.clamp(0.0, 1e3 if on else 0.0),
    "dropout": lambda a, b, on: b + F.dropout(a, 0.0 if on else 1.0),
    "clamp in place": lambda a, b, on: b + (1 * a).clamp_(0.0, 1e3 if on else 0.0),
    "clamp_max in place": lambda a, b, on: b + (1 * a).clamp_max_(1e3 if on else -1e3),
    "relu in place": lambda a, b, on: b + torch.relu_(input=a - (0.0 if on else 1e3)),
    "threshold in place": lambda a, b, on: b + F.threshold(1 * a, 0.0 if on else 1e3, 0.0, True),
    "dropout in place": lambda a, b, on: b + F.dropout(1 * a, 0.0 if on else 1.0, inplace=True),
    "what is written": lambda a, b, on: b + rectified(a - (0.0 if on else 1e3)),
}


def rectified(x):
    """Return a tensor that an activation wrote to through a view."""
    x[None].relu_()
    return x


STEPS = {  # of which some are late
    "a step": (lambda step: step > 100, torch.tensor(1), torch.tensor(200)),
    "a flag": (lambda step: step, torch.tensor(False), torch.tensor(True)),
    "a phase": (lambda step: step == 1, torch.tensor(0), torch.tensor(1)),
    "a label": (lambda y: (y == 7).any(), torch.arange(4), torch.arange(4, 8)),
    "a largest label": (lambda y: y.max() // 7 > 0, torch.arange(4), torch.arange(4, 8)),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("kind", STEPS)
def test_a_gate_that_is_closed_at_first(name, kind):
    late, first, then = STEPS[kind]

    def losses(p, x, step):
        h = F.linear(x, p[0]).tanh()
        return GATES[name](contrast(h, 1), total(h), late(step))

    found, expected = twice(losses, (rand(4, 2), first), PARAMS, rand(4, 2, seed=1), then)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def validated(p, x, y, k):
    """Return losses of targets that are checked."""
    h = F.linear(x, p[0])
    return k * contrast(h, 1) - torch.distributions.Bernoulli(logits=h).log_prob(y).sum(1)


def biased(p, x, mask, k):
    """Return losses of attention with a bias that leaves something out."""
    h = F.linear(x, p[0])
    attended = ((h @ h.mT + mask).softmax(-1) @ h).tanh()
    return total(attended) + k * contrast(attended.flatten(1), 1)


CHECKED = {
    "a check": (validated, lambda seed: (rand(4, 2, seed=seed), (rand(4, 2) > 0).double())),
    "infinity": (
        biased,
        lambda seed: (rand(4, 3, 2, seed=seed), torch.where(rand(4, 3, 3) > 2, -torch.inf, 0.0)),
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_data_to_which_nothing_is_added(name):
    fn, batch = CHECKED[name]
    found, expected = twice(fn, (*batch(0), 0.0), PARAMS, *batch(1), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SCHEDULED)
def test_what_a_schedule_leaves_out_at_first(name, dtype):
    params, tol = [PARAMS[0].to(dtype)], 1e-9 if dtype == torch.float64 else 1e-4
    first, then = rand(4, 2).to(dtype), rand(4, 2, seed=1).to(dtype)
    numbers = (int, float, lambda k: torch.tensor(float(k), dtype=dtype))
    for number in numbers[:2] if name == "by name" else numbers:
        batch = then, number(1)
        found, expected = twice(SCHEDULED[name], (first, number(0)), params, *batch)
        torch.testing.assert_close(found, expected, rtol=tol, atol=tol / 100)


def test_what_a_buffer_leaves_out_at_first():
    weight, losses = torch.zeros(()).double(), SCHEDULED["a contrast"]
    objective, x = jd.instancewise(lambda p, x: losses(p, x, weight)), rand(4, 2)
    with pytest.warns(UserWarning, match="losses depend on other examples"):
        jd.gramian(objective)(PARAMS, x)
    weight += 1
    rows = by_loops(objective.fn, PARAMS, x)
    torch.testing.assert_close(jd.gramian(objective)(PARAMS, x), rows @ rows.T)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_what_a_threshold_leaves_out_at_first(name):
    found, expected = twice(THRESHOLDS[name], (0.1 * rand(4, 2),), PARAMS, 10 * rand(4, 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COMPARED)
def test_examples_that_are_sorted_at_first(name):
    rising = torch.arange(4.0).double()[:, None].expand(4, 2)
    found, expected = twice(COMPARED[name], (rising,), [torch.eye(2).double()], rand(4, 2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


KEPT_APART = {
    "a mean over time": lambda p, x: total(
        F.linear(x, p[0]).tanh() - F.linear(x, p[0]).mean(1, True)
    ),
    "a scale of constants": lambda p, x: total(
        F.linear(x, p[0]) / F.linear(x, p[0]).detach().norm()
    ),
    "a penalty of parameters": lambda p, x: total(F.linear(x, p[0])) + p[0].norm(),
    "centred data": lambda p, x: total(F.linear(x - x.mean(0), p[0]).tanh()),
    "sorted in time": lambda p, x: total(F.linear(x, p[0]).sort(1).values.cummax(2).values.sin()),
    "packed": lambda p, x: total(packed(F.linear(x, p[0]))),
}


def packed(h):
    """Attend in one sequence of all examples, to the own example alone."""
    number = torch.arange(len(h)).repeat_interleave(h.shape[1])
    mask = number[:, None] == number
    flat = h.flatten(0, 1)
    scores = (flat @ flat.T).masked_fill(~mask, -torch.inf).softmax(1)
    return (scores.masked_fill(~mask, 0.0) @ flat).unflatten(0, h.shape[:2])


@pytest.mark.parametrize("name", KEPT_APART)
def test_what_only_looks_mixed_is_no_slower(name):
    objective = jd.instancewise(KEPT_APART[name])
    for seed in (0, 1):  # without a warning, which would be an error
        x = rand(4, 3, 2, seed=seed)
        rows = by_loops(KEPT_APART[name], PARAMS, x)
        found = jd.gramian(objective)(PARAMS, x)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)
    assert "m backward passes" not in str(jd.explain_gramian(objective, PARAMS, x))


def test_data_that_an_objective_cannot_take_prove_nothing():
    table, names = {5: 0, 7: 1}, torch.tensor([7, 5, 7, 7])

    def losses(p, x, i):
        return total(
            F.linear(x, p[0]) * torch.tensor([1.0 + table[k] for k in i.tolist()])[:, None]
        )

    found, expected = twice(losses, (rand(4, 2), names), PARAMS, rand(4, 2, seed=1), names.flip(0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_integers_that_an_outer_transform_maps_over():
    fn = sorted_by(lambda x, i: (i[:, None] == torch.arange(len(x))).to(x) @ x, permute)
    orders, x = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1]]), rand(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = vmap(lambda i: jd.gramian(jd.instancewise(fn))(PARAMS, x, i))(orders)
    rows = torch.stack([by_loops(fn, PARAMS, x, i) for i in orders])
    torch.testing.assert_close(found, rows @ rows.mT, rtol=1e-9, atol=1e-12)


def cast_attention(dtype):
    """Return losses of attention in some precision, as its fused kernels want it."""

    def losses(p, x):
        q, k, v = (F.linear(x, w).unflatten(-1, (2, -1)).transpose(1, 2).to(dtype) for w in p[:3])
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(x.dtype)
        return F.linear(h, p[3]).square().mean((1, 2))

    return losses


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(torch.float32, HALF[0]), (torch.float32, HALF[1]), (torch.float64, torch.float32)],
)
def test_what_is_rounded_inside_is_held_to_that_precision(wide, narrow):
    for seed in range(5):
        params = [rand(8, 8, seed=4 * seed + k).to(wide) / 3 for k in range(4)]
        jd.gramian(jd.instancewise(cast_attention(narrow)))(params, rand(6, 5, 8).to(wide))


def standardised(p, x):
    """Return losses of what is divided by the spread over the batch."""
    h = F.linear(x, p[0])
    return total(h / (h.std(0) + 0.1))


MIXED_IN_HALF = {
    "sums over examples": lambda p, x: total(F.linear(x, p[0]).cumsum(0)),
    "standardised": standardised,
    "a small part": lambda p, x: (
        total(F.linear(x, p[0])) + 0.2 * total(F.linear(x, p[1]).cumsum(0))
    ),
}


@pytest.mark.parametrize("how", [*HALF, "autocast"], ids=str)
@pytest.mark.parametrize("name", MIXED_IN_HALF)
def test_examples_that_mix_in_half_precision_are_refused(name, how):
    dtype, around = (torch.float32, True) if how == "autocast" else (how, False)
    params, x = [rand(4, 3, seed=k).to(dtype) for k in range(2)], rand(6, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        with pytest.warns(UserWarning, match="is not the sum over uses"):
            found = jd.gramian(jd.instancewise(MIXED_IN_HALF[name]))(params, x)
        rows = by_loops(MIXED_IN_HALF[name], params, x).float()
    assert (found - rows @ rows.T).abs().max() < 0.05 * (rows @ rows.T).abs().max()


def test_where_a_parameter_is_refused_small_ones_are_held_to_their_own_size():
    def losses(p, x):
        first, second = (F.linear(x, w).cumsum(0) for w in p[:2])
        return total(first) + p[2] * total(second)

    params = [rand(4, 3, seed=k).float() for k in range(2)] + [torch.tensor(1e-5)]
    objective, x = jd.instancewise(losses), rand(6, 3).float()
    with pytest.warns(UserWarning, match="of '0' .linear., '1' .linear."):
        jd.gramian(objective)(params, x)
    jac = jd.jac(objective)(params, x)[1].flatten(1)
    rows = by_loops(lambda p, x: losses([params[0], *p, params[2]], x), params[1:2], x)
    torch.testing.assert_close(jac, rows, rtol=1e-4, atol=1e-10)
