"""The main job: its step is one graph, equals eager, maps over seeds; its command line works."""

import json

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


def test_the_command_prints_a_table_and_saves_a_picture(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    assert digits.main(["--steps", "3", "--eager", "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    for word in ("upgrad", "accuracy", "lowest cosine", "steps/s", "second", str(picture)):
        assert word in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "--steps: must be at least 2, got 1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--methods", "nope"], "invalid choice: 'nope'"),
        (["--out", "curves.txt"], "must end in .png"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        digits.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_models_trained_together_are_those_trained_one_by_one(tmp_path, capsys):
    out = tmp_path / "ensemble.json"
    assert ensemble.main(["--quick", "--members", "3", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert 0 < found["difference"] < 1e-12
    assert found["rows"][0].keys() == {"members", "runs_ms", "ensemble_ms"}
    assert [part["chunk_size"] for part in found["chunks"]] == [1, 3]
    assert "| 3 | " in capsys.readouterr().out
