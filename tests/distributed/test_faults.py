"""Ranks that disagree are named before numbers are exchanged; ranks that end stop no other."""

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchjd_func as jd
from tests import workers
from torchjd_func import _tree

TIMEOUT = 5.0  # seconds, of the collectives of a crew


def start(what):
    """Start a rule on a Jacobian that is different on the last rank."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    jac = {"w": torch.ones(3, 4), "b": torch.ones(3, 2)}
    rule, seed = jd.gradvac(), 0
    if odd and what == "m":
        jac = _tree.map(lambda leaf: leaf[:2], jac)
    if odd and what == "shape":
        jac["b"] = torch.ones(3, 5)
    if odd and what == "dtype":
        jac["w"] = jac["w"].double()
    if odd and what == "name":
        jac["bias"] = jac.pop("b")
    if odd and what == "rule":
        rule = jd.pcgrad()
    if odd and what == "key":
        seed = 1
    return jd.distributed.data_parallel(rule).init(jac, key=jd.random.key(seed))


DIFFERENT = {
    "m": ("jac.b", r"\(3, 2\)", r"\(2, 2\)"),
    "shape": ("jac.b", r"\(3, 2\)", r"\(3, 5\)"),
    "dtype": ("jac.w", "float32", "float64"),
    "name": ("jac.b", r"\(3, 2\)", "nothing"),
    "rule": ("rule", "gradvac", "pcgrad"),
    "key": ("key", r"\[", r"\["),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_are_named(what, world):
    path, first, other = DIFFERENT[what]
    pattern = (
        f"^`{path}` must be the same.*{first}.* on process 0 and .*{other}.* on process {world - 1}"
    )
    for failure in workers.outcomes(world, start, what):
        assert failure.kind == "ValueError"
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(failure.message)


def losses_start():
    """Start a scalarizer on as many losses as the rank says."""
    jd.distributed.data_parallel(jd.scalarizers.mean()).init(torch.ones(2 + dist.get_rank()))


def test_numbers_of_losses():
    for failure in workers.outcomes(2, losses_start):
        assert failure.kind == "ValueError"
        assert "`losses` must be the same on all processes" in failure.message


def same():
    """Check trees that are alike but for their numbers."""
    jd.distributed.check_same({"x": torch.full((2,), dist.get_rank()), "n": 3, "none": None})


def test_trees_that_agree():
    workers.run(2, same)


def outside():
    """Start a rule in a group that this process is not in, if it is the last."""
    group: Any = dist.new_group([0])
    jac = torch.eye(2)
    jd.distributed.data_parallel(jd.upgrad(), group)(jac)
    jd.distributed.check_same({"jac": jac}, group)


def test_a_process_outside_the_group():
    inside, failure = workers.outcomes(2, outside)
    assert inside is None
    assert failure.kind == "RuntimeError"
    assert "`group`" in failure.message


def step_for_ever(name):
    """Aggregate until something fails; return what did, and after how long a step."""
    rule = jd.distributed.data_parallel({"upgrad": jd.upgrad(), "graddrop": jd.graddrop()}[name])
    jac = torch.eye(3, 1000)
    state, start = None, time.monotonic()
    while True:
        try:
            state = rule.init(jac, key=jd.random.key(0)) if state is None else state
            start = time.monotonic()
            _, state = rule(jac, state)
        except RuntimeError as error:
            return str(error), time.monotonic() - start


def sharded_step_for_ever(name):
    """Differentiate by sharded parameters until something fails."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = distribute_tensor(torch.ones(30), mesh, [Shard(0)])
    objective = jd.distributed.sharded(lambda w: (w.sum(), w[0] - 2 * w[1]))
    start = time.monotonic()
    while True:
        try:
            start = time.monotonic()
            jd.grad(objective, jd.upgrad())(None, w)
        except RuntimeError as error:
            return str(error), time.monotonic() - start


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (step_for_ever, "upgrad"),
        (step_for_ever, "graddrop"),
        (sharded_step_for_ever, "sharded"),
    ],
)
def test_a_rank_that_is_killed_stops_the_others(steps, name):
    with workers.crew(3, TIMEOUT) as crew:
        crew.send(steps, name)
        time.sleep(1.0)
        crew.kill(1)
        first, gone, last = crew.receive()
    assert gone is None
    for rank, (message, seconds) in ((0, first), (2, last)):
        assert_names(message, rank, 3)
        assert seconds < 2 * TIMEOUT


def test_a_rank_that_hangs_stops_the_others_after_the_time_out():
    with workers.crew(2, TIMEOUT) as crew:
        crew.send(step_for_ever, "upgrad")
        time.sleep(1.0)
        os.kill(crew.processes[1].pid or 0, signal.SIGSTOP)
        message, seconds = crew.answer(0)
    assert_names(message, 0, 2)
    assert seconds < 2 * TIMEOUT


def assert_names(message, rank, world):
    """Check that a message names the rank and the collective."""
    collectives = ("all_reduce", "reduce_scatter", "all_gather", "full_tensor", "redistribute")
    assert message.startswith(
        tuple(f"`{name}` must reach all {world} processes" for name in collectives)
    )
    assert f"an error on process {rank}: " in message


def fail_alone():
    """Fail on one rank, with no collective before it."""
    if dist.get_rank() == 1:
        raise KeyError("missing")
    return "fine"


def test_the_harness_reports_what_a_rank_raised():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2:.*KeyError: 'missing'"):
        workers.run(2, fail_alone)
    assert workers.outcomes(2, fail_alone)[0] == "fine"


def sleep():
    """Take too long."""
    time.sleep(60.0)


def test_the_harness_ends_what_takes_too_long():
    with workers.crew(1) as crew:
        with pytest.raises(TimeoutError, match="rank 0 of 1"):
            crew.outcomes(sleep, patience=0.2)
        assert not crew.processes[0].is_alive()
