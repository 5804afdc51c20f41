"""A seeded run of `python -m tests.distributed.fuzz`."""

from tests import workers
from tests.distributed.fuzz import draw_call, faults


def alone():
    """Run in a process whose only group is that of the calls."""
    import torch.distributed as dist

    dist.destroy_process_group()
    return faults(300, seed=1)


def test_drawn_calls_return_or_say_what_is_wrong():
    with workers.crew(1) as crew:
        assert crew.outcomes(alone) == [[]]


def test_draws_are_reproducible():
    assert [draw_call(at).shown() for at in range(20)] == [
        draw_call(at).shown() for at in range(20)
    ]
