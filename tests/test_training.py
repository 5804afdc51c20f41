"""The main job: its step is one graph, equals eager, maps over seeds; its command line works."""

import pytest
import torch
from torch.func import vmap

import torchjd_func as jd
from benchmarks import digits, ensemble
from tests.helpers import assert_trees_close, compiled
from torchjd_func import _tree

RULES = {name: digits.METHODS[name] for name in ("mean", "upgrad", "mgda")}


@pytest.mark.parametrize("make", digits.PROBLEMS.values(), ids=digits.PROBLEMS.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_step_is_one_graph_and_equals_eager(make, rule):
    problem = make(0)
    params = _tree.map(torch.Tensor.double, problem.params)
    images, labels = problem.train
    step = digits.make_step(problem.objective, rule())
    fast, counter = compiled(step)
    eager = (params, ())
    graph = (params, ())
    for key in jd.random.split(jd.random.key(1), 3):
        batch = digits.pick((images.double(), labels), key)
        *eager, loss, cosine = step(*eager, batch)
        *graph, fast_loss, fast_cosine = fast(*graph, batch)
        assert_trees_close((graph, fast_loss), (eager, loss))
        torch.testing.assert_close(fast_cosine, cosine, rtol=1e-6, atol=1e-9)
        if rule is not jd.mean:
            assert cosine > -1e-6
    assert counter.graphs == 1


@pytest.mark.parametrize("make", digits.PROBLEMS.values(), ids=digits.PROBLEMS.keys())
def test_the_step_maps_over_seeds(make):
    problems = [make(seed) for seed in range(3)]
    batch = digits.pick(problems[0].train, jd.random.key(5))
    step = digits.make_step(problems[0].objective, jd.upgrad())
    stacked = _tree.stack([problem.params for problem in problems])
    mapped = vmap(lambda params: step(params, (), batch))(stacked)
    loop = _tree.stack([step(problem.params, (), batch) for problem in problems])
    assert_trees_close(mapped, loop, rtol=1e-3, atol=1e-5)
    first = _tree.leaves(mapped[0])[-1]
    assert (first[0] - first[1]).abs().max() > 1e-3  # seeds differ


def test_training_learns_and_upgrad_does_not_conflict():
    problem = digits.one_digit(0)
    step = digits.make_step(problem.objective, jd.upgrad())
    params, cosines = problem.params, []
    for key in jd.random.split(jd.random.key(0), 60):
        params, _, _, cosine = step(params, (), digits.pick(problem.train, key))
        cosines.append(float(cosine))
    assert problem.scores(params, problem.test)["digit"][1] > 0.6
    assert min(cosines) > -1e-3  # float32


def test_models_trained_together_are_those_trained_one_by_one():
    problem, k = digits.two_digits(0), 3
    data = problem.train[0].double(), problem.train[1]
    wanted = ensemble.preferences(k).double()
    together = _tree.map(torch.Tensor.double, ensemble.start(k))
    apart, step = jd.ensemble.unstack(together), ensemble.make_step(problem)
    for key in jd.random.split(jd.random.key(1), 20):
        batch = digits.pick(data, key)
        together, _ = jd.ensemble.each(step, shared=2)(wanted, together, batch)
        apart = [params for params, _ in ensemble.each_by_itself(step, wanted, apart, batch)]
    assert_trees_close(together, jd.ensemble.stack(apart), 1e-12)
