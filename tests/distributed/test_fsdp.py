"""A transformer of FSDP2 goes on where another number of processes stopped."""

import contextlib
import io
import re
import subprocess
import sys

import pytest

from benchmarks import fsdp
from tests import workers


def losses(printed):
    """Return the losses that a run prints, by step."""
    lines = re.findall(r"step +(\d+): large (\S+), falling (\S+)", printed)
    return {int(step): (float(first), float(second)) for step, first, second in lines}


def launched(processes, *options):
    """Run the script, as users do."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc-per-node", str(processes), "-m", "benchmarks.fsdp", *options]
    done = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def straight_on(folder):
    """Train in a process that is there already, and save after two steps."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fsdp.train(4, folder, 2, False)
    return losses(printed.getvalue())


def test_one_process_goes_on_where_two_stopped(tmp_path):
    folder = str(tmp_path / "checkpoint")
    straight, _ = workers.run(2, straight_on, folder)
    resumed = launched(1, "--steps", "4", "--resume", "--folder", folder)
    assert sorted(straight) == [0, 1, 2, 3]
    assert sorted(resumed) == [2, 3]
    for step, values in resumed.items():
        assert values == pytest.approx(straight[step], abs=1e-3)
