"""A transformer of FSDP2 goes on where another number of processes stopped."""

import re
import subprocess
import sys

import pytest


def losses(processes, *options):
    """Return the losses that a run prints, by step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc-per-node", str(processes), "-m", "benchmarks.fsdp", *options]
    done = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"step +(\d+): large (\S+), falling (\S+)", done.stdout)
    return {int(step): (float(first), float(second)) for step, first, second in lines}


def test_one_process_goes_on_where_two_stopped(tmp_path):
    folder = ("--folder", str(tmp_path / "checkpoint"))
    straight = losses(2, "--steps", "4", "--save-after", "2", *folder)
    resumed = losses(1, "--steps", "4", "--resume", *folder)
    assert sorted(straight) == [0, 1, 2, 3]
    assert sorted(resumed) == [2, 3]
    for step, values in resumed.items():
        assert values == pytest.approx(straight[step], abs=1e-3)
