"""What loses for now may win later: of two, of several, by an index, by a number in the code."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import torchjd_func as jd
from tests.differentiate.test_layerwise_kinds import rand, total
from tests.programs import by_loops

PARAMS, X = [rand(4, 3)], rand(5, 3)


def hidden(params, x):
    return F.linear(x, params[0])


def chosen(scores, values):
    """Return the values with the largest scores."""
    return values.gather(0, scores.argmax(0, keepdim=True))[0]


RIVALS = {  # what comes of an example, and of its neighbour, which is too small at first
    "maximum": torch.maximum,
    "maximum of a row": lambda a, b: torch.maximum(a, b[:, :1]),
    "fmax": torch.fmax,
    "minimum": lambda a, b: torch.minimum(a, -b),
    "clamp": lambda a, b: torch.clamp(a, min=b),
    "logaddexp": torch.logaddexp,
    "hinge": lambda a, b: a + F.relu(b - a),
    "where": lambda a, b: torch.where(a > b, a, b.sin()),
    "a flag": lambda a, b: a + (b > a).to(a) * b,
    "amax": lambda a, b: torch.stack([a, b]).amax(0),
    "max": lambda a, b: torch.stack([a, b], 1).max(1).values,
    "median": lambda a, b: torch.stack([a, a + 1, b]).median(0).values,
    "logsumexp": lambda a, b: torch.stack([a, b]).logsumexp(0),
    "softmax": lambda a, b: (torch.stack([a, b]).softmax(0) * torch.stack([a, b]).detach()).sum(0),
    "sort": lambda a, b: torch.stack([a, b]).sort(0).values[1],
    "topk": lambda a, b: torch.stack([a, b], 1).topk(1, 1)[0],
    "kthvalue": lambda a, b: torch.stack([a, b]).kthvalue(2, 0).values,
    "quantile": lambda a, b: torch.stack([a, b]).quantile(1.0, 0),
    "cummax": lambda a, b: torch.stack([a, b]).cummax(0).values[1],
    "max_pool1d": lambda a, b: F.max_pool1d(torch.stack([a, b], 2), 2),
    "vector_norm": lambda a, b: torch.linalg.vector_norm(
        torch.stack([a, b.exp()]), float("inf"), 0
    ),
    "argmax": lambda a, b: chosen(torch.stack([a, b]), torch.stack([a, b])),
    "argmax of constants": lambda a, b: chosen(
        torch.stack([a, b]).detach(), torch.stack([a, b]).sin()
    ),
    "gumbel_softmax": lambda a, b: (
        F.gumbel_softmax(torch.stack([a, b]), dim=0, hard=True) * torch.stack([a, b]).sin()
    ).sum(0),
}


def found_later(fn, first, then):
    """Return the Gramian with a number that comes after another one, and what it should be."""
    numbers = [first]
    objective = jd.instancewise(lambda params, x: fn(params, x, numbers[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jd.gramian(objective)(PARAMS, X)
        numbers[0] = then
        torch.manual_seed(0)
        found = jd.gramian(objective)(PARAMS, X)
    torch.manual_seed(0)
    rows = by_loops(fn, PARAMS, X, then)
    return found, rows @ rows.T


@pytest.mark.parametrize("name", RIVALS)
def test_a_neighbour_that_is_too_small_at_first(name):
    def losses(params, x, shift):
        h = hidden(params, x)
        return total(h.tanh()) + total(RIVALS[name](h, h.roll(1, 0) + shift))

    found, expected = found_later(losses, -1e3, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


NUMBERS = {  # of an example and its neighbour, with a number that leaves this one out at first
    "addmm": lambda a, b, k: torch.addmm(a, b, torch.eye(4).to(a), alpha=k),
    "baddbmm": lambda a, b, k: torch.baddbmm(
        a[:, None], b[:, None], torch.eye(4).to(a).expand(len(a), 4, 4), alpha=k
    ),
    "renorm": lambda a, b, k: a + b.renorm(2, 0, k + 1e-200),
    "leaky_relu": lambda a, b, k: a + F.leaky_relu(-b.abs(), k),
    "elu": lambda a, b, k: a + F.elu(-b.abs(), k),
    "pow": lambda a, b, k: a + b.abs() ** k,
    "hypot": lambda a, b, k: torch.hypot(a, b * k),
    "softplus": lambda a, b, k: a + F.softplus(b - 1e3 * (1 - k)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_neighbour_that_a_number_leaves_out_at_first(name):
    def losses(params, x, k):
        h = hidden(params, x)
        return total(h.tanh()) + total(NUMBERS[name](h, h.roll(1, 0), k))

    found, expected = found_later(losses, 0.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def attention(params, x, p):
    """Return losses of attention with a learned bias, and dropout."""
    tokens = x[:, None] * torch.arange(1.0, 5.0).to(x)[:, None]
    bias = params[0] @ params[0].T
    return total(F.scaled_dot_product_attention(tokens, tokens, tokens, bias, p).tanh())


def added(*args, **kwargs):
    return torch.addmm(*args, **kwargs).tanh()


FORMS = {  # for one number alone
    "alpha": (lambda params, x, k: total(added(x.new_zeros(4), x, params[0].T, alpha=k)), 1, 2),
    "beta": (lambda params, x, k: total(added(params[0][:, 0], x, params[0].T, beta=k)), 1, 0),
    "dropout of attention": (attention, 0, 0.5),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_for_other_numbers(name):
    fn, first, then = FORMS[name]
    assert "backward" not in str(jd.explain_gramian(jd.instancewise(fn), PARAMS, X, float(first)))
    found, expected = found_later(fn, float(first), float(then))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_forms_for_two_numbers_are_planned_once_each():
    fn, first, then = FORMS["alpha"]
    runs = []

    def counted(params, x, k):
        runs.append(k)
        return fn(params, x, k)

    gramian = jd.gramian(jd.instancewise(counted))
    for k in (first, then, first, then):
        runs.clear()
        found = gramian(PARAMS, X, float(k))
        rows = by_loops(fn, PARAMS, X, float(k))
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)
    assert len(runs) <= 2


def test_a_graph_for_other_numbers():
    fn, first, then = FORMS["alpha"]
    gramian = jd.gramian(jd.instancewise(fn))
    gramian(PARAMS, X, float(first))
    compiled = torch.compile(gramian, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="compiled without a plan"):
        found = compiled(PARAMS, X, float(then))
    rows = by_loops(fn, PARAMS, X, float(then))
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)


def packed(h, mask):
    """Attend in one sequence of all examples, to the own example alone."""
    flat, number = h.flatten(0, 1), torch.arange(len(h)).repeat_interleave(h.shape[1])
    scores = flat @ flat.T + torch.where(number[:, None] == number, 0.0, mask)
    return (scores.softmax(1) @ flat).unflatten(0, h.shape[:2])


KEPT_APART = {
    "packed": lambda h: packed(h, -torch.inf),
    "packed by 1e9": lambda h: packed(h, -1e9),
    "the largest in time": lambda h: h.amax(1),
    "sorted in time": lambda h: h.sort(1).values[:, 1],
    "pooled in time": lambda h: F.max_pool1d(h.mT, 2),
    "an expert": lambda h: chosen(h.mean(2).T[:, :, None], h.transpose(0, 1)),
    "the best of two": lambda h: torch.maximum(h[:, 0], h[:, 1] - 100),
    "rounded": lambda h: h + (h.round() - h).detach(),
    "gated": lambda h: h[:, 0] * torch.sigmoid(h[:, 1] - 100),
    "dropped out": lambda h: F.dropout(h, 0.5),
    "padded": lambda h: torch.cat([h, torch.zeros_like(h)], 1).logsumexp(1),
    "written to": lambda h: h.index_fill(1, torch.tensor([0]), 0.0).cumsum(1),
}


@pytest.mark.parametrize("name", KEPT_APART)
def test_gates_within_an_example_keep_their_factors(name):
    def losses(params, x):
        tokens = x[:, None] * torch.arange(1.0, 5.0).to(x)[:, None]
        return total(KEPT_APART[name](hidden(params, tokens).tanh()).sin())

    torch.manual_seed(0)
    rows = by_loops(losses, PARAMS, X)
    objective = jd.instancewise(losses)
    for _ in range(2):
        torch.manual_seed(0)
        found = jd.gramian(objective)(PARAMS, X)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-12)
    assert "backward" not in str(jd.explain_gramian(objective, PARAMS, X))


OF_PARAMETERS = {
    "clipped": lambda w, m, g: w.clamp(-0.5, 0.5) + m,
    "a bounded norm": lambda w, m, g: w * (g / w.norm(dim=0).clamp(min=3)),
    "the largest": lambda w, m, g: w / w.amax(0) * g,
    "rectified": lambda w, m, g: w + F.relu(m[:, :2]) @ m[:2],
}


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_gates_of_parameters_alone_keep_factors(name):
    """They hold no example back; a warning is an error."""
    params = [torch.randn(3, 4).double(), torch.randn(3, 4).double(), rand(4)]

    def fn(params, x):
        return (x @ OF_PARAMETERS[name](*params)).tanh().sum(1)

    x = rand(5, 3)
    rows = by_loops(fn, params, x)
    objective = jd.instancewise(fn)
    torch.testing.assert_close(jd.gramian(objective)(params, x), rows @ rows.T)
    lines = jd.explain_gramian(objective, params, x).leaves
    assert not [line for line in lines if line.contraction == "m backward passes"]
