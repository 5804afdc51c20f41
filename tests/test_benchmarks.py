"""Benchmarks have one form: settings, rows with date and machine, tables, pictures."""

import datetime
import json
import math
import re

import pytest
import torch

from benchmarks import _form, digits, solvers
from benchmarks.__main__ import ALL
from tests import readme

EVERY = pytest.mark.parametrize("benchmark", ALL, ids=lambda benchmark: benchmark.name)
TINY = {
    "methods": {"methods": ("upgrad", "graddrop"), "sizes": (4,), "seconds": 0.0},
    "solvers": {"sizes": (2,), "problems": 8},
    "many_objectives": {"sizes": (4,)},
    "gramian": {"models": ("mlp",), "few": True, "seconds": 0.0},
    "grouping": {"methods": (), "seconds": 0.0},
    "compiling": {"methods": ()},
    "ensemble": {"members": (3,), "seconds": 0.0},
    "digits": {"methods": ("upgrad",), "steps": 3, "eager": True},
}


@EVERY
def test_each_measures_reports_and_saves(benchmark, tmp_path, capsys):
    plan = {benchmark: benchmark.full | benchmark.quick | TINY.get(benchmark.name, {})}
    _form.run(plan, tmp_path)
    found = json.loads((tmp_path / f"{benchmark.name}.json").read_text())
    assert datetime.date.fromisoformat(found["date"])
    assert {"machine", "python", "torch", "torchjd", "settings"} <= set(found)
    assert benchmark.report(found["rows"]) in capsys.readouterr().out
    picture = tmp_path / f"{benchmark.name}.png"
    assert picture.exists() == (benchmark.draw is not None)


@EVERY
def test_quick_settings_are_settings(benchmark):
    assert set(benchmark.quick) <= set(benchmark.full)
    assert benchmark.full | benchmark.quick != benchmark.full
    assert set(benchmark.choices) <= set(benchmark.full)


@pytest.mark.parametrize("path", sorted(_form.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_full_and_can_be_shown(path):
    name, *card = path.stem.split("-")
    (benchmark,) = [benchmark for benchmark in ALL if benchmark.name == name]
    found = json.loads(path.read_text())
    assert datetime.date.fromisoformat(found["date"])
    if card:  # as much as there was time for
        assert found["settings"]["device"] == "cuda"
        assert found["card"] == " ".join(card)
    else:
        assert found["settings"] == json.loads(json.dumps(benchmark.full))
    assert benchmark.report(found["rows"]).count("|") > 10


def test_commands_of_the_manual_are_benchmarks():
    named = set(re.findall(r"python -m benchmarks\.(\w+)", readme.prose()))
    assert named
    assert named <= {benchmark.name for benchmark in ALL}


def test_only_full_runs_go_to_the_results(monkeypatch):
    folders = []
    monkeypatch.setattr(_form, "run", lambda plan, folder: folders.append(folder))
    everything = ALL, digits.BENCHMARK
    for arguments in ([], ["--quick"], ["--steps", "9"]):
        assert _form.main(digits.BENCHMARK, arguments=arguments) == 0
    for arguments in ([], ["--full"], ["--full", "--only", "digits"]):
        assert _form.main(*everything[0], arguments=arguments, quick=True) == 0
    results, quick = _form.RESULTS, _form.QUICK
    assert folders == [results, quick, quick, quick, results, results]


def test_on_a_device_all_run_that_can(monkeypatch):
    plans = []
    monkeypatch.setattr(_form, "run", lambda plan, folder: plans.append(plan))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _form.main(*ALL, arguments=["--device", "cuda"], quick=True) == 0
    (plan,) = plans
    assert {benchmark.name for benchmark in plan} >= {"methods", "gramian", "grouping", "ensemble"}
    assert {settings["device"] for settings in plan.values()} == {"cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_said(capsys):
    with pytest.raises(SystemExit):
        _form.main(*ALL, arguments=["--device", "cuda"])
    assert "--device: there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--methods", "nope"], "invalid choice: 'nope'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        _form.main(digits.BENCHMARK, arguments=arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_slow_routes_are_left_out_and_times_are_of_one_call():
    times = iter(range(1000))
    routes = {"fast": lambda: None, "slow": lambda: sum(range(10**6))}
    assert set(_form.minima(routes, 0.0, slow=1e-3)) == {"fast"}
    counted = _form.minima({"counted": lambda: next(times)}, 0.0)
    assert 0 < counted["counted"] < 1e-3
    assert next(times) == 2 + 3 * (_form.ROUNDS - 1)


def test_numbers_tables_and_growth():
    assert [_form.number(x, 2) for x in (0.123, 9.96, 99.9, math.nan)] == ["0.12", "10", "100", "-"]
    rows = [{"m": m, "ms": 3.0 * m**2} for m in (2, 4, 8)]
    assert _form.exponent(rows, "m", "ms") == pytest.approx(2)
    assert math.isnan(_form.exponent(rows[:1], "m", "ms"))
    assert solvers.report([{"m": 2, **solvers.census(2, 8)._asdict()}]).count("\n") == 4


def test_a_compiled_main_job_learns():
    (row,) = digits.train("one loss per example", "upgrad", steps=60, seed=0, eager=False)
    assert all(map(math.isfinite, (*row["losses"], *row["cosines"])))
    assert row["losses"][-1] < row["losses"][0] / 2
