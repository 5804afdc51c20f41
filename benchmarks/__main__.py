"""Run the benchmarks: `python -m benchmarks [--only NAME ...] [--device cuda] [--full]`."""

from importlib import import_module

from benchmarks._form import main

NAMES = (
    "methods",
    "solvers",
    "many_objectives",
    "gramian",
    "grouping",
    "compiling",
    "ensemble",
    "digits",
)
ALL = [import_module(f"benchmarks.{name}").BENCHMARK for name in NAMES]

if __name__ == "__main__":
    raise SystemExit(main(*ALL, quick=True))
