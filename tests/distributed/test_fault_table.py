"""Each fault, under each way to spread a step: an error that names it in time, or a result."""

import pytest
import torch
import torch.distributed as dist

from tests import workers
from tests.distributed.fault_table import (
    ANSWERED,
    cases,
    ended,
    faults,
    wrong,
)
from torchjd_func.distributed import _collectives, _handshake

COMPILED = [
    ("data_parallel", "skip"),
    ("sharded", "m"),
    ("gathered", "uneven"),
]


@pytest.mark.parametrize(
    ("pairs", "backend"),
    [(cases(ANSWERED), None), (COMPILED, "eager")],
    ids=["eager", "compiled"],
)
def test_each_fault_is_an_error_in_time_or_a_result(pairs, backend):
    first, second = workers.run(2, faults, pairs, backend)
    for kind, case in pairs:
        assert not wrong(kind, case, first[kind, case], second[kind, case])


def unlike(backend):
    """Compile a check of different shapes, and an exchange of numbers after it."""

    def step(x):
        after = _handshake.agreed({"x": x}, (None,))
        return _collectives.all_reduce(after(x[:1]), None)

    torch._dynamo.reset()
    fast = torch.compile(step, backend=backend, fullgraph=True)
    fast(torch.ones(3))
    fast(torch.ones(3 + dist.get_rank()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_keeps_the_check(backend):
    for failure in workers.outcomes(2, unlike, backend):
        assert failure.kind == "ValueError"
        assert failure.message.startswith("`x` must be the same on all processes, got a tensor")


def test_a_process_that_ends_stops_a_compiled_step():
    message, seconds = ended("data_parallel", "kill", "eager", 5.0)
    assert not wrong("data_parallel", "kill", message, None)
    assert seconds < 10.0
